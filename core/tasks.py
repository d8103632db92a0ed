"""What the command line's tasks do."""

from __future__ import annotations

import inspect
import json
import os
import re
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from polyspec.errors import ConfigError, InputError, unknown
from polyspec.files import whole_file
from polyspec.outputs import Audio, Result
from polyspec.pipelines import pipeline
from polyspec.recipe import find_recipe


def generate(config: DictConfig) -> None:
    """Make what the prompt asks for, write it, print one table."""
    from transformers.utils import logging

    prompts = requests(config)
    logging.disable_progress_bar()  # loading takes a moment; the bar here is over tokens
    console = Console()
    check_output(config.output)
    pipe = make_pipeline(config, config.recipe.name if config.get("recipe") else None)
    arguments = {
        **(OmegaConf.to_container(config.modality, resolve=True).get("arguments") or {}),  # type: ignore[union-attr]
        **{k: v for k, v in config.sampling.items() if v is not None},
        "seed": config.seed,
    }
    takes = inspect.signature(pipe.__call__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):  # else all of `generate`'s arguments are taken
        if unused := [name for name, value in arguments.items() if name not in takes and value is not None]:
            raise ConfigError(f"{unused[0]} does not apply to {config.modality.name}; leave it out")
        arguments = {name: value for name, value in arguments.items() if name in takes}
    plain = None
    if config.compare:
        baseline = make_pipeline(config, "autoregressive")
        baseline(prompts, **arguments)  # both sides start warm
        plain = with_progress(console, "plain", baseline, prompts, arguments)
        pipe(prompts, **arguments)
    streamed = bool(config.modality.get("stream")) and len(prompts) == 1 and plain is None
    if streamed:
        result = pipe(prompts, streamer=pipe.streamer(), **arguments)
    else:
        result = with_progress(console, pipe.method.recipe.name, pipe, prompts, arguments)
    paths = write_outputs(result, config.output, str(prompts[0]), plain)
    console.print(summary(result, plain))
    for text in (o for o in result.outputs if isinstance(o, str) and not streamed):
        console.print(text, markup=False)
    for number, ranked in enumerate(o for o in result.outputs if isinstance(o, list)):
        console.print(ranking(ranked, f"history {number}" if len(result.outputs) > 1 else None))
    for path in paths:
        console.print(f"wrote {path}", markup=False, highlight=False)


def train(config: DictConfig) -> None:
    """Train what the `train` group describes, with the modality's `train` module or the core's for draft heads."""
    if missing := sorted(OmegaConf.missing_keys(config.train)):
        raise ConfigError(f"set {', '.join(f'{key}=…' for key in missing)}")
    module, _, function = str(config.train.entry).partition(":")
    getattr(import_module(module), function)(config.train)


def make_pipeline(config: DictConfig, recipe: str | None, target: Any = None) -> Any:
    """The configured modality's pipeline with `recipe`, its knobs as configured if it is the configured recipe.

    target: a loaded model to use instead of the configured one."""
    overrides = {}
    if recipe is not None and config.get("recipe") and recipe == config.recipe.name:
        known = find_recipe(recipe)
        given = OmegaConf.to_container(config.recipe, resolve=False)
        assert isinstance(given, dict)
        overrides = {k: v for k, v in given.items() if k in (*known.needs, *known.takes) or known.knobs.get(str(k), v) != v}
    name = config.modality.name
    if name not in {e.name for e in entry_points(group="polyspec.modalities")}:
        raise unknown("modality", name, {e.name for e in entry_points(group="polyspec.modalities")})
    target = config.target if target is None else target
    return pipeline(name, target=target, recipe=recipe, overrides=overrides, device=config.device, dtype=config.dtype)


def requests(config: DictConfig) -> list[Any]:
    """What is asked for: prompts, or what the modality asks for in their place. InputError if there is nothing."""
    asks = config.modality.get("asks", "prompt")
    if asks == "prompt":
        return as_list(config.prompt)
    if config.prompt is not None:
        raise InputError(f"{config.modality.name} takes no prompt; set {asks}=…")
    found = config[asks]
    given = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    if not isinstance(given, list) or not given:
        raise InputError(f'no {asks}; give a list of ids, e.g. {asks}="[1,50,181]"')
    return given if all(isinstance(one, list) for one in given) else [given]


def as_list(prompt: Any) -> list[str]:
    """Prompts as a list; InputError if there is none."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not prompts:
        raise InputError('no prompt; say what to make, e.g. prompt="red heart"')
    return [str(p) for p in prompts]


def with_progress(console: Console, label: str, pipe: Any, prompts: list[str], arguments: dict[str, Any]) -> Result:
    """Run a pipeline under a progress bar over token positions."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        job = bar.add_task(label, total=None)
        return pipe(prompts, progress=lambda n: bar.advance(job, n), **arguments)


def summary(result: Result, plain: Result | None = None) -> Table:
    """One table: what was made, how many target calls it took, how long, and how much sooner than plainly."""
    table = Table(show_header=True)
    rows = [("plain", plain)] if plain else []
    for column in ("recipe", "guarantee", "tokens", "target calls", "tokens per call", "seconds", "speed-up"):
        name = column in ("recipe", "guarantee")
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for name, r in [*rows, (result.stats.recipe, result)]:
        s = r.stats
        gain = f"{plain.stats.wall_seconds / s.wall_seconds:.2f}×" if plain else "-"
        table.add_row(
            name,
            s.guarantee,
            str(s.new_tokens),
            str(s.target_calls),
            f"{s.tokens_per_call:.2f}",
            f"{s.wall_seconds:.2f}",
            gain,
        )
    return table


def ranking(items: list[Any], title: str | None = None) -> Table:
    """A list of recommendations, best first."""
    shown = Table("", "item", "title", "score", title=title, title_justify="left")
    for rank, item in enumerate(items, 1):
        shown.add_row(str(rank), str(item.item_id), item.title or "", f"{item.score:.3f}")
    return shown


def check_output(output: str | None) -> None:
    """Refuse a place that cannot be written before any work starts."""
    folder = Path(output).parent if output else Path()
    if output and Path(output).is_dir():
        raise InputError(f"cannot write {output}: it is a folder; name a file in it, {Path(output) / 'heart.png'} say")
    if not folder.is_dir():
        raise InputError(f"cannot write {output}: there is no folder {folder}; create it or choose another output=")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder.resolve()}; choose another output=")


def write_outputs(result: Result, output: str | None, prompt: str, plain: Result | None) -> list[Path]:
    """Write the sounds; or the pictures: each one, several also as a contact sheet, and beside plain ones if there are; or,
    if `output` is given, lists as JSON, or texts. Returns paths."""
    from PIL import Image

    lists = [[asdict(r) for r in o] for o in result.outputs if isinstance(o, list)]
    texts = [o for o in result.outputs if isinstance(o, str)]
    if (lists or texts) and output:
        with whole_file(Path(output)) as temporary:
            temporary.write_text((json.dumps(lists, indent=1) if lists else "\n".join(texts)) + "\n", encoding="utf-8")
        return [Path(output)]

    if sounds := [o for o in result.outputs if isinstance(o, Audio)]:
        return write_sounds(sounds, Path(output or f"{slug(prompt)}.wav"))
    pictures = [o for o in result.outputs if isinstance(o, Image.Image)]
    if not pictures:
        return []
    from polyspec.modalities.image.evaluate import contact_sheet

    stem = Path(output or f"{slug(prompt)}.png")
    files = [(stem, pictures[0])]
    if len(pictures) > 1:
        numbers = [str(i) for i in range(len(pictures))]
        files = [(stem.with_stem(f"{stem.stem}-{i}"), p) for i, p in zip(numbers, pictures, strict=True)]
        files.append((stem, contact_sheet(pictures, numbers)))
    if plain is not None:
        both = [p for pair in zip(plain.outputs, pictures, strict=True) for p in pair]
        labels = [f"plain {plain.stats.wall_seconds:.1f} s", f"{result.stats.recipe} {result.stats.wall_seconds:.1f} s"]
        sheet = contact_sheet(both, labels * len(pictures), columns=2 if len(pictures) == 1 else 4, scale=3)
        files.append((stem.with_stem(f"{stem.stem}-compare"), sheet))
    for path, picture in files:
        try:
            with whole_file(path) as temporary:
                picture.save(temporary)
        except (ValueError, KeyError) as error:
            raise InputError(f"cannot write {path}: {error}; use a file name that ends in .png") from error
    return [path for path, _ in files]


def write_sounds(sounds: list[Audio], path: Path) -> list[Path]:
    """Write each sound, several with a number in their names. Returns paths."""
    import soundfile

    several = len(sounds) > 1
    paths = [path.with_stem(f"{path.stem}-{i}") if several else path for i in range(len(sounds))]
    for at, sound in zip(paths, sounds, strict=True):
        try:
            with whole_file(at) as temporary:
                soundfile.write(temporary, sound.waveform.T.float().numpy(), sound.sample_rate)
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            raise InputError(f"cannot write {at}: {error}; use a file name that ends in .wav") from error
    return paths


def slug(prompt: str) -> str:
    """A file's name after what was asked for."""
    return re.sub(r"[^\w-]+", "-", prompt.lower()).strip("-")[:60]
