"""What every modality's pipeline shares: its recipe, its knobs, loading a checkpoint, progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor
from transformers.generation import logits_process as hf

from polyspec.errors import CheckpointError, ConfigError, unknown
from polyspec.files import shipped
from polyspec.outputs import Result
from polyspec.recipe import Method, Recipe, build, find_recipe, recipes


class Pipeline(Protocol):
    """A modality's `Pipeline` class: built from these arguments, called with a prompt."""

    method: Method
    """The recipe in use."""

    def __init__(
        self,
        *,
        target: Any = None,
        recipe: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ): ...

    def __call__(self, *args: Any, seed: int | Sequence[int] | None = None, **kwargs: Any) -> Result: ...


def pipeline(modality: str, **kwargs: Any) -> Any:
    """The pipeline of `modality`: "text", "image", "recommendation", or one a plugin brings.

    target: a folder, hub id or loaded model; by default the modality's sample. recipe: a name out of
    `recipes(modality)`; by default the modality's best exact one. overrides: knobs of the recipe and what it needs.
    device, dtype: by default what the machine and the checkpoint suggest.
    Raises ConfigError for unknown names, CheckpointError for a target that cannot be loaded.
    """
    return part_of(modality, "pipeline").Pipeline(**kwargs)


def part_of(modality: str, part: str) -> Any:
    """The module `part` ("pipeline", "evaluate", "own_data", …) of a modality's package. ConfigError for an unknown
    modality, or one that has no such part."""
    found = {e.name: e for e in entry_points(group="polyspec.modalities")}
    if modality not in found:
        raise unknown("modality", modality, found)
    name = f"{found[modality].value.partition(':')[0]}.{part}"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # a package that the part imports
            raise
        raise ConfigError(f"modality {modality!r} has no {part} module ({name}), which this needs") from error


def choose(
    modality: str, recipe: str | None, default: str, overrides: Mapping[str, Any] | None, sample: str | None = None
) -> Method:
    """Build the recipe asked for; ConfigError if it does not apply to `modality`.

    sample: the name of the shipped sample if that is the target. Drafters trained for it are shipped too, and are taken
    where the recipe needs one and none is given."""
    chosen: Recipe = find_recipe(recipe or default)
    if modality not in chosen.modalities:
        raise ConfigError(
            f"recipe {chosen.name!r} is not for modality {modality!r} (it is for {', '.join(chosen.modalities)}); "
            f"choose one of: {', '.join(r.name for r in recipes(modality))}"
        )
    given = dict(overrides or {})
    wanted = (*chosen.needs, *(chosen.takes if given.get("init") == "drafter" else ()))
    for need in wanted if sample else ():
        if given.get(need) is None and (folder := shipped_drafter(sample, chosen, need)):
            given[need] = str(folder)
    return build(chosen, given)


def is_from(target: Any, folder: Path) -> bool:
    """Whether `target`, a pipeline's argument, is the sample in `folder`: left out, or loaded from there."""
    return target is None or (isinstance(target, tuple) and getattr(target[0], "name_or_path", None) == str(folder))


def shipped_drafter(sample: str | None, recipe: Recipe, need: str) -> Path | None:
    """The folder of the `need` ("heads", "draft_model") of `recipe` that is shipped for `sample`, None if there is none."""
    from hydra.utils import get_object

    drafter = recipe.config.drafter
    made_by: Any = get_object(drafter.get("inner", drafter)._target_)
    kinds = getattr(made_by, "shipped", None)
    if kinds is None:
        kinds = (made_by.kind.config_class.model_type.removeprefix("polyspec_") if need == "heads" else need,)
    folders = [shipped("drafters") / sample / kind for kind in kinds] if sample else []
    return next((folder for folder in folders if (folder / "config.json").exists()), None)


def default_device() -> str:
    """cuda or mps if the machine has it, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the processor has instructions for it, else float32."""
    if torch.device(device).type == "cpu":
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if capable else torch.float32
    return torch.bfloat16


def as_dtype(dtype: str | torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """A torch dtype from its name; ConfigError if there is none of that name."""
    if dtype is None:
        return default_dtype(device)
    if isinstance(dtype, torch.dtype):
        return dtype
    names = ("float32", "bfloat16", "float16")
    if dtype not in names:
        raise unknown("dtype", str(dtype), names)
    return getattr(torch, dtype)


def load(loader: Callable[..., Any], source: str | Path, **kwargs: Any) -> Any:
    """`loader(source, **kwargs)`, a `from_pretrained`; whatever goes wrong becomes one CheckpointError."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise CheckpointError(f"{source} holds no config.json; give the folder that save_pretrained wrote")
    try:
        return loader(source, **kwargs)
    except Exception as error:  # transformers, safetensors and the hub raise a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"cannot load {source}: {reason}") from error


def processors(
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> list[LogitsProcessor]:
    """The sampling knobs of `generate` as transformers' processors, in its order. ConfigError outside their ranges."""
    chosen: list[LogitsProcessor] = []
    if temperature is not None and not temperature > 0:
        raise ConfigError(f"temperature must be > 0, got {temperature}; for the most likely tokens use do_sample=False")
    if top_k is not None and top_k < 0:
        raise ConfigError(f"top_k must be ≥ 1, or 0 for all tokens, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], got {value}")
    if temperature not in (None, 1.0):
        chosen.append(hf.TemperatureLogitsWarper(float(temperature)))
    if top_k:
        chosen.append(hf.TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        chosen.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        chosen.append(hf.MinPLogitsWarper(min_p))
    return chosen
