"""Recipes: one YAML file names a published method, that is a loop, a drafter, an acceptance rule and defaults.

They live in `conf/recipe/` of this package and of every installed modality plugin. Hydra's `_target_` is the only
registry. A recipe's keys beside the reserved ones are its knobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from polyspec.errors import ConfigError, PolyspecError, unknown

GUARANTEES = ("exact", "bounded", "group-exact", "heuristic")
DESCRIPTION = ("name", "paper", "guarantee", "summary", "modalities")
STRUCTURE = (*DESCRIPTION, "draws", "needs", "takes", "loop", "drafter")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A published method: its name, arXiv id ("" if none), what it guarantees, one line on what it does, where it
    applies, and its configuration (`config`, resolved when it is built)."""

    name: str
    paper: str
    guarantee: str
    summary: str
    modalities: tuple[str, ...]
    config: DictConfig

    @property
    def knobs(self) -> dict[str, Any]:
        """Knob names and defaults."""
        names = [str(k) for k in self.config if k not in STRUCTURE]
        return {k: self.config[k] for k in names if not OmegaConf.is_interpolation(self.config, k)}

    @property
    def needs(self) -> tuple[str, ...]:
        """What the user must hand over: `draft_model`, `heads`, `datastore`, …"""
        return tuple(self.config.get("needs", ()))

    @property
    def takes(self) -> tuple[str, ...]:
        """What the user may hand over beside; without it the recipe runs with no drafter."""
        return tuple(self.config.get("takes", ()))


@dataclass(frozen=True, slots=True)
class Method:
    """A recipe put together: the loop, a factory that makes the drafter, the length policy, and how tokens are drawn."""

    recipe: Recipe
    loop: Any
    drafter: Any
    length: Any
    draws: str


def configuration_packages() -> tuple[str, ...]:
    """This package's `conf` and that of every modality plugin that has one."""
    packages = ["polyspec.conf"]
    for entry in sorted(entry_points(group="polyspec.modalities"), key=lambda e: e.name):
        module = entry.value.partition(":")[0]
        if module.startswith("polyspec."):
            continue
        package = f"{module}.conf"
        try:
            import_module(package)
        except ModuleNotFoundError:
            continue
        packages.append(package)
    return tuple(packages)


def _yaml_files(group: str) -> Iterator[Traversable]:
    for package in configuration_packages():
        folder = files(package) / group
        if folder.is_dir():
            yield from sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)


def _load(file: Traversable) -> DictConfig:
    return OmegaConf.create({"recipe": OmegaConf.create(file.read_text(encoding="utf-8"))}).recipe


@cache
def _recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for file in _yaml_files("recipe"):
        config = _load(file)
        missing = [k for k in ("name", "guarantee", "summary", "loop") if k not in config]
        if missing or config.guarantee not in GUARANTEES:
            raise ConfigError(
                f"recipe file {file.name} lacks {missing or 'a guarantee out of ' + ', '.join(GUARANTEES)}"
            )
        if config.name in found:
            raise ConfigError(f"{file} brings a recipe {config.name!r}, but there is one of that name; rename it")
        found[config.name] = Recipe(
            config.name,
            str(config.get("paper", "")),
            config.guarantee,
            config.summary,
            tuple(config.get("modalities", ())),
            config,
        )
    return found


def recipes(modality: str | None = None) -> list[Recipe]:
    """All recipes, or those that apply to `modality`. Raises ConfigError for an unknown modality."""
    found = list(_recipes().values())
    if modality is None:
        return found
    known = {m for r in found for m in r.modalities} | {e.name for e in entry_points(group="polyspec.modalities")}
    if modality not in known:
        raise unknown("modality", modality, known)
    return [r for r in found if modality in r.modalities]


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`; ConfigError with the nearest names if there is none."""
    if name not in _recipes():
        raise unknown("recipe", name, _recipes())
    return _recipes()[name]


def build(recipe: Recipe, overrides: Mapping[str, Any]) -> Method:
    """Put `recipe` together with `overrides` of its knobs and the objects it needs.

    Raises ConfigError for an unknown knob, a missing need, or a value out of range.
    """
    from hydra.errors import HydraException
    from hydra.utils import instantiate

    handed = (*recipe.needs, *recipe.takes)
    objects = {k: v for k, v in overrides.items() if k in handed and v is not None}
    knobs = {k: v for k, v in overrides.items() if k not in handed}
    for key in knobs:
        if key not in recipe.knobs:
            raise unknown(f"knob of recipe {recipe.name}", key, (*recipe.knobs, *handed, "seed"))
    for need in recipe.needs:
        if objects.get(need) is None:
            raise ConfigError(f"recipe {recipe.name!r} needs {need}=…; {NEEDS.get(need, 'see its documentation')}")
    try:
        root = OmegaConf.create({"recipe": recipe.config})
        for key, value in knobs.items():
            root.recipe[key] = value
        plain = OmegaConf.to_container(root.recipe, resolve=True)
        assert isinstance(plain, dict)
        loop = instantiate(plain["loop"], _convert_="all")
        drafts = "drafter" in plain and (bool(objects) or not recipe.takes)
        drafter = instantiate(plain["drafter"] if drafts else NO_DRAFTER)
        named = "length" if "length" in knobs or "window" not in recipe.knobs else "window"
        length = make_length(plain.get("length", 1), named)
        made = drafter(**objects)
    except PolyspecError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, PolyspecError):
            raise error.__cause__ from None
        raise ConfigError(f"recipe {recipe.name!r} cannot be built: {error}") from error
    # made once, so that what is wrong with it shows now; a copy a run, so that runs share no state
    return Method(recipe, loop, lambda: copy(made), length, plain.get("draws", "independent"))


NO_DRAFTER = {"_target_": "polyspec.drafting.NoDraft", "_partial_": True}
NEEDS = {
    "draft_model": "a smaller transformers model with the target's tokenizer, or the folder of one",
    "heads": "trained draft heads, or the folder that `polyspec task=train` wrote",
    "datastore": "texts or token lists to look continuations up in",
    "pools": "the file that retrieval pools are kept in (made by the first run), or polyspec.drafting.pools.Pools",
}


def make_length(spec: Any, knob: str = "length") -> Any:
    """A length policy from an int (fixed), the name of a file in `conf/length`, or a `_target_` mapping; what is none
    of these is reported as a value of `knob`."""
    from hydra.utils import instantiate

    from polyspec.lengths import Fixed, positive

    if isinstance(spec, str):
        named = {f.name.removesuffix(".yaml"): f for f in _yaml_files("length")}
        if spec not in named:
            raise unknown("length policy", spec, named)
        spec = OmegaConf.to_container(_load(named[spec]), resolve=True)
    return instantiate(spec) if isinstance(spec, dict) else Fixed(positive(knob, spec))
