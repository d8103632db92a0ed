"""The command `polyspec`: Hydra composes the configuration, `conf/task/*.yaml` says which function runs it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from polyspec.errors import PolyspecError, unknown
from polyspec.recipe import NEEDS, configuration_packages


@hydra.main(version_base="1.3", config_path="pkg://polyspec.conf", config_name="config")
def run(config: DictConfig) -> None:
    """Run the chosen task on the composed configuration."""
    try:
        hydra.utils.instantiate(config.task.run)(config)
    except PolyspecError as error:
        fail(str(error))


def main() -> None:
    """Entry point. Bad input ends in one line on stderr and exit status 2."""
    plugins = [f"pkg://{p}" for p in configuration_packages()[1:]]
    if plugins:
        sys.argv.append(f"hydra.searchpath=[{','.join(plugins)}]")
    if any(a.startswith("recipe=") for a in sys.argv):  # what a recipe needs is not among the knobs of its file
        needs = tuple(f"recipe.{need}=" for need in NEEDS)
        sys.argv[1:] = [f"++{a}" if a.startswith(needs) else a for a in sys.argv[1:]]
    # errors reach us whole: hydra's own handler prints a traceback and exits
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        run()
    except MissingConfigException as error:
        name = (error.missing_cfg_file or "").removesuffix(".yaml")
        group, _, option = name.rpartition("/")
        fail(str(unknown(group or "configuration", option, error.options or ())))
    except ConfigCompositionException as error:
        missing = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", str(error))
        name = missing and (missing[1] or missing[2])
        fail(str(unknown("setting", name, settings(sys.argv[1:], name))) if name else first_line(error))
    except HydraException as error:
        fail(first_line(error))
    except KeyboardInterrupt:
        fail("interrupted")


def settings(given: Sequence[str], wrong: str) -> list[str]:
    """What can be set on the command line: the groups, and the keys of the configuration that the other overrides make;
    where these are wrong too, the root's."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    others = [a for a in given if "=" in a and not re.match(rf"[+~-]*({re.escape(wrong)}=|hydra)", a)]
    GlobalHydra.instance().clear()
    root: Any = {}
    for overrides in (others, []):
        try:
            with initialize_config_module("polyspec.conf", version_base="1.3"):
                root = OmegaConf.to_container(compose("config", overrides), resolve=False)
            break
        except HydraException:
            continue
    return [*keys_of(root), "modality", "recipe", "task"]


def keys_of(node: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Dotted names of all settings in a configuration."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from keys_of(value, f"{before}{key}.")
        elif not str(key).startswith("_"):
            yield f"{before}{key}"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def fail(message: str) -> None:
    """Say what is wrong and leave with status 2."""
    print(f"polyspec: error: {message}", file=sys.stderr)
    raise SystemExit(2)
