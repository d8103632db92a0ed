"""`polyspec task=bench modality=all`: the benches of all modalities, and one report of them.

Every part runs in a process of its own, interleaved within as always, with all recipes whose drafters come with the sample
or that need none; those left out are named with the reason. Then each part's example is made plainly and with its best exact
recipe. `report.html` holds everything in itself; the same figures are in `report.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from polyspec import pipelines
from polyspec.bench.page import page
from polyspec.errors import ConfigError, PolyspecError, unknown
from polyspec.outputs import Result
from polyspec.prompts import load_prompts
from polyspec.recipe import recipes
from polyspec.tasks import whole_file

PLAIN, PICTURED = "autoregressive", "vision_language"


def run(config: DictConfig) -> None:
    """Run the parts that the `bench` group describes, and write report.html and report.json."""
    settings: Any = OmegaConf.to_container(config.bench, resolve=True)
    folder, console = Path(settings["output"]), Console()
    chosen = settings["only"] or list(settings["parts"])
    for name in chosen:
        if name not in settings["parts"]:
            raise unknown("part", name, settings["parts"])
    folder.mkdir(parents=True, exist_ok=True)
    if PICTURED in chosen:
        draw(folder / "pictures", settings["count"], config)
    parts: list[dict[str, Any]] = []
    for name in chosen:
        part, place = settings["parts"][name], folder / name
        console.rule(name)
        plain, left_out = (
            pipelines.pipeline(part["modality"], recipe=PLAIN, device=config.device, dtype=config.dtype),
            {},
        )
        wanted = part.get("recipes", "all")
        if wanted == "all":
            wanted, left_out = ready(part["modality"], plain.loaded)
            wanted += part.get("also", [])
        bench(config, part, wanted, settings, place)
        report = json.loads((place / "results.json").read_text(encoding="utf-8"))
        plots = [str(p) for p in sorted(place.glob("*.png"))]
        made = []
        if given := part.get("example"):
            plots += [given["image"]] if "image" in given else []
            made = list(examples(config, part, given))
        parts.append({"name": name, "report": report, "plots": plots, "left_out": left_out, "examples": made})
    command = " ".join(["polyspec", *sys.argv[1:]])
    with whole_file(folder / "report.html") as path:
        path.write_text(page(command, parts), encoding="utf-8")
    kept = [{k: p[k] for k in ("name", "report", "left_out")} for p in parts]
    with whole_file(folder / "report.json") as path:
        path.write_text(json.dumps({"command": command, "parts": kept}, indent=1, default=str) + "\n", encoding="utf-8")
    console.print(f"wrote {folder / 'report.html'} and {folder / 'report.json'}", markup=False, highlight=False)


def draw(folder: Path, count: int, config: DictConfig) -> None:
    """Pictures to ask about, by the image sample."""
    pipe = pipelines.pipeline("image", device=config.device, dtype=config.dtype)
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(pipe(load_prompts("emoji")[:count], seed=config.seed).outputs):
        with whole_file(folder / f"{number:02}.png") as path:
            picture.save(path)


def ready(modality: str, loaded: Any) -> tuple[list[str], dict[str, str]]:
    """The modality's recipes that the loaded sample can run as it is, and of the others why not."""
    able, unable = [], {}
    for recipe in recipes(modality):
        if recipe.name == PLAIN:
            continue
        try:
            pipelines.pipeline(modality, target=loaded, recipe=recipe.name)
            able.append(recipe.name)
        except PolyspecError as error:
            unable[recipe.name] = str(error)
    return able, unable


def bench(
    config: DictConfig, part: Mapping[str, Any], wanted: Sequence[str] | None, settings: Mapping[str, Any], place: Path
) -> None:
    """One part's bench in a process of its own; ConfigError if it fails."""
    given = [f"device={config.device or 'null'}", f"dtype={config.dtype or 'null'}", f"seed={config.seed}"]
    given += [f"bench.output={place}", f"bench.count={settings['count']}", f"bench.repeats={settings['repeats']}"]
    given += [] if wanted is None else [f"bench.recipes=[{','.join(wanted)}]"]
    command = [
        sys.executable,
        "-m",
        "polyspec",
        "task=bench",
        f"modality={part['modality']}",
        *given,
        *part["arguments"],
    ]
    if code := subprocess.run(command, check=False).returncode:
        raise ConfigError(f"this bench ended with {code}: {' '.join(command[3:])}")


def examples(config: DictConfig, part: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, Result]]:
    """What the part's example becomes plainly and with its recipe, by default the modality's best; both warm."""
    knobs = {"device": config.device, "dtype": config.dtype}
    fast = pipelines.pipeline(part["modality"], recipe=part.get("recipe"), **knobs)
    slow = pipelines.pipeline(part["modality"], target=fast.loaded, recipe=PLAIN)
    for name, pipe in (("plain", slow), (fast.method.recipe.name, fast)):
        pipe(**given, seed=config.seed)
        yield name, pipe(**given, seed=config.seed)
