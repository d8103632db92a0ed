"""`polyspec task=bench`: recipes against transformers' own generate and the plain loop, interleaved in one run.

For every batch of prompts each contestant runs in turn, another one first each time, so that a machine whose speed drifts
slows all of them alike; what is reported are medians of the ratios taken batch by batch. With each speed-up come its ceiling,
`tokens per call × time of a 1-token call / time of an N-token call` with all three measured in the same run, and
`efficiency = speed-up of decoding / ceiling`: how much of the possible gain the loop and the drafter leave. Decoding is all
but what the plain loop spends on taking in the prompt and on making sound or pictures of tokens, which no recipe can save. In
a batch, rows finish after different numbers of calls: a call is timed with as many rows as ran on average, and the tokens of
all rows are counted.
Where drafts are drawn, the share that is accepted stands beside 1 − TV(p, q), the most that a lossless rule can accept of
this drafter's.
Recipes that promise the plain loop's own tokens (temperature 0, shared Gumbel noise) are compared with it output by output.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from polyspec import pipelines
from polyspec.bench.figures import Contestant, results
from polyspec.bench.overlap import watched
from polyspec.bench.report import machine, notes, plot, plot_positions, plot_quality, table
from polyspec.errors import InputError
from polyspec.metrics import DecodingStats
from polyspec.outputs import Audio
from polyspec.tasks import make_pipeline, whole_file

WATCHED = 4  # batches on which acceptance is counted beside 1 − TV


def run(config: DictConfig) -> None:
    """Run the bench that the `bench` group describes and write results.json and results.png; with a `serve` group, load the
    service instead; a `bench` group with a `runner` is that function's."""
    if config.get("serve"):
        from polyspec.bench import load

        load.run(config)
        return
    if config.bench.get("runner"):
        from hydra.utils import get_method

        get_method(config.bench.runner)(config)
        return
    settings: Any = OmegaConf.to_container(config.bench, resolve=True)
    console = Console()
    folder = Path(settings["output"])
    evaluate = pipelines.part_of(config.modality.name, "evaluate")
    prompts = evaluate.bench_prompts(settings["prompts"])[: settings["count"]]
    if not prompts:
        raise InputError(f"bench.prompts={settings['prompts']} holds no prompt")
    plain = make_pipeline(config, "autoregressive")
    contestants = [Contestant("transformers", None), Contestant("plain loop", plain)]
    entries = [config.recipe] if config.get("recipe") else settings["recipes"]
    for entry in entries:
        contestants.append(contestant(config, entry, plain.loaded))
    arguments = {**settings["arguments"], **{k: v for k, v in config.sampling.items() if v is not None}}
    sizes = settings["batch"] if isinstance(settings["batch"], list) else [settings["batch"]]
    parts: list[dict[str, Any]] = []
    for size in sizes:
        fresh = [replace(c, seconds=[], stats=[], outputs=[], overlap=None) for c in contestants]
        batches = batches_of(prompts, size)
        time_all(fresh, evaluate, plain, batches, settings["repeats"], arguments, config.seed, console)
        parts += measured_parts(
            fresh, evaluate, plain, batches, arguments, settings, f"batch {size}" if len(sizes) > 1 else ""
        )
    report = {
        "machine": machine(),
        "modality": config.modality.name,
        "device": str(plain.model.device),
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "seed": config.seed,
        "settings": settings,
        "arguments": arguments,
        "results": parts[0]["results"],
        **({"sections": parts} if len(parts) > 1 else {}),
    }
    if (settings.get("quality") or {}).get("path"):
        report["quality"] = quality(config, contestants, settings["quality"], arguments, console)
    write_report(folder, report)
    for part in parts:
        console.print(table(report, part["name"], part["results"]))
        for line in notes(report, part["results"]):
            console.print(line, markup=False, highlight=False)
    console.print(f"wrote {folder / 'results.json'} and {folder / 'results.png'}", markup=False, highlight=False)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """The figures as JSON, and the plots."""
    sections = report.get("sections") or [report]
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "results.json") as path:
        path.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    with whole_file(folder / "results.png") as path:
        plot(report, path)
    if any(r["accepted_by_position"] for part in sections for r in part["results"]):
        with whole_file(folder / "positions.png") as path:
            plot_positions(report, path)
    if "quality" in report:
        with whole_file(folder / "quality.png") as path:
            plot_quality(report, path)


def kind_of(prompt: Any) -> str:
    """What a prompt is measured apart as; most are of no kind."""
    return getattr(prompt, "kind", "")


def batches_of(prompts: Sequence[Any], size: int) -> list[list[Any]]:
    """Prompts in batches, each of one kind."""
    kinds: dict[str, list[Any]] = {}
    for prompt in prompts:
        kinds.setdefault(kind_of(prompt), []).append(prompt)
    return [own[i : i + size] for own in kinds.values() for i in range(0, len(own), size)]


def time_all(
    contestants: Sequence[Contestant],
    evaluate: Any,
    plain: Any,
    batches: Sequence[Sequence[Any]],
    repeats: int,
    arguments: Mapping[str, Any],
    seed: int,
    console: Console,
) -> None:
    """Run every contestant on every batch in turn, `repeats` times, and note what that took."""
    with Progress(console=console, transient=True) as bar:
        job = bar.add_task("bench", total=(repeats * len(batches) + 2) * len(contestants) - 2)
        for number, batch in enumerate([batches[0], *(list(batches) * repeats)]):
            turn = number % len(contestants)  # nobody always runs behind the same one
            for c in [*contestants[turn:], *contestants[:turn]]:
                if number == 0 and hasattr(evaluate, "prepare"):
                    evaluate.prepare(c.pipe, batches)
                seconds, stats, outputs = measure(c, evaluate, plain, batch, arguments, seed)
                if number > 0:  # the first batch warms up
                    c.seconds.append(seconds)
                    c.stats.append(stats)
                    c.outputs.append(outputs)
                bar.advance(job)
        for c in contestants[2:]:  # counting takes time, so not in the runs that are timed
            c.overlap = overlap(c, evaluate, batches[:WATCHED], arguments, seed)
            bar.advance(job)


def measured_parts(
    contestants: Sequence[Contestant],
    evaluate: Any,
    plain: Any,
    batches: Sequence[Sequence[Any]],
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    name: str,
) -> list[dict[str, Any]]:
    """Results of all runs, and where prompts are of several kinds, of each kind's."""
    rates = unhindered(contestants, evaluate, plain, batches[0], arguments)
    kinds = [kind_of(batch[0]) for batch in batches]
    parts = []
    for kind in ["", *(dict.fromkeys(kinds) if len(set(kinds)) > 1 else ())]:
        runs = [i for i in range(len(contestants[0].seconds)) if kind in ("", kinds[i % len(kinds)])]
        found = [c.only(runs) for c in contestants]
        rows = results(found, rates, plain, batches[0], arguments, settings.get("large_target"))
        parts.append({"name": ", ".join(part for part in (name, kind) if part), "results": rows})
    return parts


def ask(evaluate: Any, pipe: Any, batch: Sequence[Any], **arguments: Any) -> Any:
    """A pipeline's answer to a batch, as the modality asks it; most take the prompts alone."""
    asking = getattr(evaluate, "ask", None)
    return pipe(list(batch), **arguments) if asking is None else asking(pipe, batch, **arguments)


def contestant(config: DictConfig, entry: Any, loaded: tuple[Any, Any]) -> Contestant:
    """A recipe by name, or with overrides, on the model that is already loaded.

    The name `transformers` is transformers' own generate, its overrides are arguments of generate:
    `{name: transformers, overrides: {prompt_lookup_num_tokens: 10}}`.
    """
    if isinstance(entry, DictConfig):  # recipe=… on the command line, its knobs as composed there
        pipe = make_pipeline(OmegaConf.merge(config, {"target": None}), str(entry.name), target=loaded)  # type: ignore[arg-type]
        return Contestant(str(entry.name), pipe)
    name, overrides = (entry, {}) if isinstance(entry, str) else (entry["name"], entry.get("overrides", {}))
    shown = ", ".join(f"{k}={'null' if v is None else v}" for k, v in overrides.items() if "/" not in str(v))
    if name == "transformers":
        shown = ", ".join(k if v is None or "/" in str(v) else f"{k}={v}" for k, v in overrides.items())
        return Contestant(f"{name} {shown}".strip(), None, overrides)
    pipe = pipelines.pipeline(config.modality.name, target=loaded, recipe=name, overrides=overrides)
    return Contestant(f"{name} {shown}".strip(), pipe)


def measure(
    c: Contestant, evaluate: Any, plain: Any, batch: Sequence[str], arguments: Mapping[str, Any], seed: int
) -> tuple[float, DecodingStats, list[str]]:
    """Seconds a token of one run, its stats, and a fingerprint of each output (none of transformers' own)."""
    arguments = {**arguments, **c.arguments}
    made: list[Any] = []
    synchronise()
    start = time.perf_counter()
    if c.pipe is None:
        torch.manual_seed(seed)
        tokens = evaluate.transformers_generate(plain, batch, **arguments)
        stats = DecodingStats(recipe=c.label, new_tokens=tokens)
    else:
        result = ask(evaluate, c.pipe, batch, seed=seed, **arguments)
        stats, made = result.stats, result.outputs
    synchronise()
    seconds = (time.perf_counter() - start) / max(stats.new_tokens, 1)
    return seconds, stats, [fingerprint(o) for o in made]


def fingerprint(output: Any) -> str:
    """Equal for equal pictures, sounds, texts, or lists of items, whose scores may differ by rounding."""
    if isinstance(output, list):
        output = [r.item_id for r in output]
    elif isinstance(output, Audio):
        output = output.waveform.numpy()
    return sha256(output.tobytes() if hasattr(output, "tobytes") else repr(output).encode()).hexdigest()


def overlap(
    c: Contestant, evaluate: Any, batches: Sequence[Sequence[Any]], arguments: Mapping[str, Any], seed: int
) -> tuple[float, float] | None:
    """The share of drawn drafts that is accepted and 1 − TV(p, q), over `batches`; None where none are drawn."""
    if c.pipe is None:
        return None
    with watched(c.pipe.method.loop) as seen:
        for batch in batches:
            ask(evaluate, c.pipe, batch, seed=seed, **{**arguments, **c.arguments})
            if seen.figures is None:
                break
    return seen.figures


def unhindered(
    contestants: Sequence[Contestant], evaluate: Any, plain: Any, batch: Sequence[str], arguments: Mapping[str, Any]
) -> dict[str, float]:
    """Tokens a second of each contestant if nothing but its target calls took time."""
    running = {c.label: min(c.rows, len(batch)) for c in contestants}
    calls = {c.label: (round(running[c.label]), round(c.tokens_scored)) for c in contestants}
    seconds: dict[tuple[int, int], float] = {}
    for rows in sorted({rows for rows, _ in calls.values()}):
        sizes = sorted({size for r, size in calls.values() if r == rows})
        found = evaluate.call_seconds(plain, batch[:rows], sizes, **arguments)
        seconds.update({(rows, size): found[size] for size in sizes})
    return {c.label: c.tokens_per_call * running[c.label] / seconds[calls[c.label]] for c in contestants}


def quality(
    config: DictConfig, contestants: Sequence[Contestant], settings: Mapping[str, Any], arguments: Any, console: Console
) -> dict[str, dict[str, float]]:
    """What the modality measures of each contestant's outputs (its module `quality`), printed as a table."""
    pipes = {c.label: c.pipe for c in contestants if c.pipe is not None}
    with console.status("drawing for the quality figures"):
        found = pipelines.part_of(config.modality.name, "quality").bench_quality(
            pipes, settings, arguments, config.seed
        )
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    shown = Table("", *names, title="quality", title_justify="left")
    for label, figures in found.items():
        shown.add_row(label, *(f"{figures[n]:.3g}" if n in figures else "" for n in names))
    console.print(shown)
    return found


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
