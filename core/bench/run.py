"""`polyspec task=bench`: recipes against transformers' own generate and the plain loop, interleaved in one run.

For every batch of prompts each contestant runs in turn, so that a machine whose speed drifts slows all of them alike;
what is reported are medians of the ratios taken batch by batch. Beside each speed-up stands its ceiling,
`tokens per call × time of a 1-token call / time of an N-token call` with all three measured in the same run, and
`efficiency = speed-up / ceiling`: how much of the possible gain the loop and the drafter leave. In a batch, rows finish after
different numbers of calls: a call is timed with as many rows as ran on average, and the tokens of all rows are counted.
Where drafts are drawn, the share that is accepted stands beside 1 − TV(p, q), the most that a lossless rule can accept of
this drafter's.
Recipes that promise the plain loop's own tokens (temperature 0, shared Gumbel noise) are compared with it output by output.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from polyspec import pipelines
from polyspec.bench.overlap import watched
from polyspec.errors import InputError
from polyspec.metrics import DecodingStats
from polyspec.outputs import Audio
from polyspec.tasks import make_pipeline, whole_file

WATCHED = 4  # batches on which acceptance is counted beside 1 − TV


@dataclass(slots=True)
class Contestant:
    """One line of the table: its label, how to run it, and what its runs took."""

    label: str
    pipe: Any  # None: transformers' own generate
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of this contestant alone
    seconds: list[float] = field(default_factory=list)
    stats: list[DecodingStats] = field(default_factory=list)
    overlap: tuple[float, float] | None = None  # of drawn drafts: share accepted, 1 − TV(p, q)
    outputs: list[str] = field(default_factory=list)  # fingerprints, in the order of the prompts and runs

    @property
    def tokens_per_call(self) -> float:
        """Over all runs."""
        calls = sum(s.row_calls for s in self.stats)
        return sum(s.new_tokens for s in self.stats) / calls if calls else 1.0

    @property
    def rows(self) -> float:
        """Mean number of rows that still ran in a target call."""
        calls = sum(s.target_calls for s in self.stats)
        return sum(s.row_calls for s in self.stats) / calls if calls else float("inf")

    @property
    def tokens_scored(self) -> float:
        """Mean number of tokens in one target call of one row."""
        calls = sum(s.row_calls for s in self.stats)
        return 1 + sum(s.scored_tokens for s in self.stats) / calls if calls else 1.0


def run(config: DictConfig) -> None:
    """Run the bench that the `bench` group describes and write results.json and results.png; with a `serve` group, load the
    service instead."""
    if config.get("serve"):
        from polyspec.bench import load

        load.run(config)
        return
    settings: Any = OmegaConf.to_container(config.bench, resolve=True)
    console = Console()
    folder = Path(settings["output"])
    evaluate = pipelines.part_of(config.modality.name, "evaluate")
    prompts = evaluate.bench_prompts(settings["prompts"])[: settings["count"]]
    if not prompts:
        raise InputError(f"bench.prompts={settings['prompts']} holds no prompt")
    batches = [prompts[i : i + settings["batch"]] for i in range(0, len(prompts), settings["batch"])]
    plain = make_pipeline(config, "autoregressive")
    contestants = [Contestant("transformers", None), Contestant("plain loop", plain)]
    entries = [config.recipe] if config.get("recipe") else settings["recipes"]
    for entry in entries:
        contestants.append(contestant(config, entry, plain.loaded))
    arguments = {**settings["arguments"], **{k: v for k, v in config.sampling.items() if v is not None}}
    with Progress(console=console, transient=True) as bar:
        job = bar.add_task("bench", total=(settings["repeats"] * len(batches) + 2) * len(contestants) - 2)
        for number, batch in enumerate([batches[0], *(batches * settings["repeats"])]):
            for c in contestants:
                seconds, stats, outputs = measure(c, evaluate, plain, batch, arguments, config.seed)
                if number > 0:  # the first batch warms up
                    c.seconds.append(seconds)
                    c.stats.append(stats)
                    c.outputs += outputs
                bar.advance(job)
        for c in contestants[2:]:  # counting takes time, so not in the runs that are timed
            c.overlap = overlap(c, batches[:WATCHED], arguments, config.seed)
            bar.advance(job)
    report = {
        "machine": machine(),
        "modality": config.modality.name,
        "device": str(plain.model.device),
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "seed": config.seed,
        "settings": settings,
        "arguments": arguments,
        "results": results(contestants, evaluate, plain, batches[0], arguments, settings.get("large_target")),
    }
    if (settings.get("quality") or {}).get("path"):
        report["quality"] = quality(config, contestants, settings["quality"], arguments, console)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "results.json") as path:
        path.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    with whole_file(folder / "results.png") as path:
        plot(report, path)
    if any(r["accepted_by_position"] for r in report["results"]):
        with whole_file(folder / "positions.png") as path:
            plot_positions(report, path)
    if "quality" in report:
        with whole_file(folder / "quality.png") as path:
            plot_quality(report, path)
    console.print(table(report))
    for line in notes(report):
        console.print(line, markup=False, highlight=False)
    console.print(f"wrote {folder / 'results.json'} and {folder / 'results.png'}", markup=False, highlight=False)


def contestant(config: DictConfig, entry: Any, loaded: tuple[Any, Any]) -> Contestant:
    """A recipe by name, or with overrides, on the model that is already loaded.

    The name `transformers` is transformers' own generate, its overrides are arguments of generate:
    `{name: transformers, overrides: {prompt_lookup_num_tokens: 10}}`.
    """
    if isinstance(entry, DictConfig):  # recipe=… on the command line, its knobs as composed there
        pipe = make_pipeline(OmegaConf.merge(config, {"target": None}), str(entry.name), target=loaded)  # type: ignore[arg-type]
        return Contestant(str(entry.name), pipe)
    name, overrides = (entry, {}) if isinstance(entry, str) else (entry["name"], entry.get("overrides", {}))
    shown = ", ".join(f"{k}={v}" for k, v in overrides.items() if "/" not in str(v))
    if name == "transformers":
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
        result = c.pipe(list(batch), seed=seed, **arguments)
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


def positions(stats: Sequence[DecodingStats]) -> list[float]:
    """Share accepted of the drafts at each position that were tried: those with nothing rejected before them."""
    depth = max((len(s.proposed_by_position) for s in stats), default=0)
    tried, kept = [0] * depth, [0] * depth
    for s in stats:
        for i, (t, k) in enumerate(zip(s.proposed_by_position, s.accepted_by_position, strict=True)):
            tried[i] += t
            kept[i] += k
    return [k / t if t else 0.0 for k, t in zip(kept, tried, strict=True)]


def same_outputs(c: Contestant, loop: Contestant, do_sample: bool | None) -> float | None:
    """The share of outputs that are the plain loop's; None where the recipe does not promise them."""
    if c.pipe is None or c is loop or c.stats[0].guarantee != "exact" or len(c.outputs) != len(loop.outputs):
        return None
    if do_sample and c.pipe.method.draws != "coupled":
        return None
    return sum(a == b for a, b in zip(c.outputs, loop.outputs, strict=True)) / max(1, len(c.outputs))


def at_large_target(c: Contestant, rows: int, model: Mapping[str, Any]) -> float:
    """What the tokens per call would be worth on a target whose weights take longer to read than to use.

    model: `ridge`, the tokens of all rows whose arithmetic takes as long as reading the weights; both are added up, so
    a call of N tokens in each of `rows` rows costs `(ridge + rows·N) / (ridge + rows)` calls of one token.
    """
    ridge = float(model["ridge"])
    return c.tokens_per_call * (ridge + rows) / (ridge + rows * c.tokens_scored)


def overlap(
    c: Contestant, batches: Sequence[Sequence[str]], arguments: Mapping[str, Any], seed: int
) -> tuple[float, float] | None:
    """The share of drawn drafts that is accepted and 1 − TV(p, q), over `batches`; None where none are drawn."""
    if c.pipe is None:
        return None
    with watched(c.pipe.method.loop) as seen:
        for batch in batches:
            c.pipe(list(batch), seed=seed, **{**arguments, **c.arguments})
            if seen.figures is None:
                break
    return seen.figures


def streams(plain: Any, batch: Sequence[str], arguments: Mapping[str, Any]) -> int:
    """Rows in a target call: two a prompt under guidance."""
    scale = plain.settings(**arguments).get("guidance_scale") if hasattr(plain, "settings") else arguments.get("guidance_scale")
    return len(batch) * (2 if scale not in (None, 1, 1.0) else 1)


def results(
    contestants: Sequence[Contestant],
    evaluate: Any,
    plain: Any,
    batch: Sequence[str],
    arguments: Mapping[str, Any],
    large_target: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One dict a contestant: ratios against transformers and the plain loop, ceiling, efficiency, acceptance."""
    reference, loop = contestants[0], contestants[1]
    rates = unhindered(contestants, evaluate, plain, batch, arguments)
    do_sample = plain.settings(**arguments)["do_sample"] if hasattr(plain, "settings") else arguments.get("do_sample")
    if do_sample is None:
        do_sample = bool(plain.model.generation_config.do_sample)
    rows, width = [], streams(plain, batch, arguments)
    for c in contestants:
        ratios = [a / b for a, b in zip(reference.seconds, c.seconds, strict=True)]
        plain_ratios = [a / b for a, b in zip(loop.seconds, c.seconds, strict=True)]
        ceiling = rates[c.label] / rates[loop.label]
        rows.append(
            {
                "label": c.label,
                "guarantee": c.stats[0].guarantee,
                "speed_up": statistics.median(ratios),
                "speed_up_over_plain_loop": statistics.median(plain_ratios),
                "tokens_per_call": c.tokens_per_call,
                "tokens_scored_per_call": c.tokens_scored,
                "ceiling": ceiling,
                "efficiency": statistics.median(plain_ratios) / ceiling,
                "tokens_per_second": 1 / statistics.median(c.seconds),
                "acceptance_rate": sum(s.accepted_tokens for s in c.stats)
                / max(1, sum(s.proposed_tokens for s in c.stats)),
                "accepted_of_tried": None if c.overlap is None else c.overlap[0],
                "one_minus_tv": None if c.overlap is None else c.overlap[1],
                "accepted_by_position": positions(c.stats),
                "same_as_plain_loop": same_outputs(c, loop, do_sample),
                "at_large_target": at_large_target(c, width, large_target) if large_target else None,
                "runs": [s.to_dict() for s in c.stats],
                "seconds_per_token": c.seconds,
            }
        )
    return rows


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


def table(report: Mapping[str, Any]) -> Table:
    """The printed form of a report."""
    title = f"{report['modality']}, {report['device']}, {report['dtype']}"
    # narrow enough for a terminal of 80 columns
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    overlaps = any(r["one_minus_tv"] is not None for r in report["results"])
    columns = ["speed\nup", "over\nloop", "tok/\ncall", "nodes\n/call", "ceil-\ning", "effi-\ncient", "tok/s"]
    shown.add_column("", overflow="fold", min_width=12)
    shown.add_column("guar-\nantee", overflow="fold")
    for column in [*columns, *(["kept/\n1−TV"] if overlaps else [])]:
        shown.add_column(column, justify="right", no_wrap=True)
    for r in report["results"]:
        own = r["guarantee"] != ""  # transformers' generate does not tell how many calls it made
        figures = (
            f"{r['speed_up']:.2f}",
            f"{r['speed_up_over_plain_loop']:.2f}",
            f"{r['tokens_per_call']:.2f}" if own else "",
            f"{r['tokens_scored_per_call']:.1f}" if own else "",
            f"{r['ceiling']:.2f}" if own else "",
            f"{r['efficiency']:.2f}" if own else "",
            f"{r['tokens_per_second']:.1f}",
            *([] if not overlaps else [overlap_cell(r)]),
        )
        shown.add_row(r["label"], r["guarantee"], *figures)
    return shown


def overlap_cell(result: Mapping[str, Any]) -> str:
    if result["one_minus_tv"] is None:
        return ""
    return f"{result['accepted_of_tried']:.2f}/{result['one_minus_tv']:.2f}".replace("0.", ".")


def notes(report: Mapping[str, Any]) -> list[str]:
    """Lines below the table: outputs equal to the plain loop's, and what the tokens per call are worth elsewhere."""
    lines = []
    same = {r["label"]: r["same_as_plain_loop"] for r in report["results"] if r["same_as_plain_loop"] is not None}
    if same:
        shares = ", ".join(f"{label} {share:.0%}" for label, share in same.items())
        lines.append(f"outputs identical to the plain loop's, of those that should be: {shares}")
    if large := report["settings"].get("large_target"):
        worth = [r for r in report["results"] if r["guarantee"]]
        shares = ", ".join(f"{r['label']} {r['at_large_target']:.2f}×" for r in worth)
        lines.append(f"the same tokens per call on {large['name']} (stated, not measured): {shares}")
    return lines


def plot_positions(report: Mapping[str, Any], path: Path) -> None:
    """Acceptance by position in the draft or window, a line a contestant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for r in report["results"]:
        if shares := r["accepted_by_position"]:
            axis.plot(range(1, len(shares) + 1), shares, marker=".", label=r["label"])
    axis.set_xlabel("position")
    axis.set_ylabel("accepted, of those tried")
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Speed-up beside tokens per call and ceiling, one group of bars a contestant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["results"]
    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(rows), 4.2), layout="constrained")
    series = (
        ("speed_up", "speed-up over transformers"),
        ("ceiling", "ceiling"),
        ("tokens_per_call", "tokens per call"),
    )
    for offset, (key, label) in enumerate(series):
        values = [r[key] for r in rows]
        bars = axis.bar([i + 0.27 * (offset - 1) for i in range(len(rows))], values, 0.25, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(rows)), [f"{r['label']}\n{r['guarantee']}" for r in rows], fontsize=8)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_title(f"{report['modality']}, {report['dtype']} on {report['machine']['processor']}", fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def plot_quality(report: Mapping[str, Any], path: Path) -> None:
    """Each measure of quality against the speed-up, a point a contestant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speed = {r["label"]: r["speed_up"] for r in report["results"]}
    found = {label: figures for label, figures in report["quality"].items() if label in speed}
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for label, figures in found.items():
            axis.plot(speed[label], figures[name], "o")
            axis.annotate(label, (speed[label], figures[name]), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set_xlabel("speed-up over transformers")
        axis.set_ylabel(name)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import transformers

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": accelerator or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
