"""`polyspec task=bench bench=image_continuous`: recipes for continuous tokens against the plain loop, interleaved in one run.

Every contestant draws the same prompts in turn, at each batch size; speed-ups are medians of the ratios taken batch by batch.
Beside the share of drafted tokens that is accepted stands Π(1 - TV_t) along their trajectories: no exact rule accepts more of
this drafter's. It is taken over the first token of every draft, whose condition is the target's own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from polyspec import pipelines
from polyspec.bench.figures import Contestant
from polyspec.bench.run import contestant, machine, measure, plot_quality, quality
from polyspec.decoding.continuous import Continuous
from polyspec.errors import InputError
from polyspec.files import whole_file
from polyspec.metrics import LatentStats
from polyspec.tasks import make_pipeline

PLAIN = "plain loop"


def run(config: DictConfig) -> None:
    """Run what the `bench` group describes; write results.json, results.png, steps.png and, if asked for, quality.png."""
    settings: Any = OmegaConf.to_container(config.bench, resolve=True)
    console, folder = Console(), Path(settings["output"])
    evaluate = pipelines.part_of(config.modality.name, "evaluate")
    prompts = evaluate.bench_prompts(settings["prompts"])[: settings["count"]]
    sizes = settings["batches"]
    if not prompts or not sizes or min(sizes) < 1:
        raise InputError("bench.prompts and bench.batches must hold a prompt and a batch size ≥ 1 at least")
    if config.get("target") is None and hasattr(evaluate, "continuous_sample"):
        config = OmegaConf.merge(config, {"target": str(evaluate.continuous_sample())})  # type: ignore[assignment]
    plain = make_pipeline(config, "autoregressive")
    if not isinstance(getattr(plain, "loop", None), Continuous):
        raise InputError("this bench is for models of continuous tokens; set target= to the folder of one")
    entries = [config.recipe] if config.get("recipe") else settings["recipes"]
    arguments = {**settings["arguments"], **{k: v for k, v in config.sampling.items() if v is not None}}
    results, pipes = [], {}
    with Progress(console=console, transient=True) as bar:
        for size in sizes:
            contestants = [Contestant(PLAIN, plain), *(contestant(config, e, plain.loaded) for e in entries)]
            pipes = {c.label: c.pipe for c in contestants}
            batches = [(prompts * size)[i : i + size] for i in range(0, max(len(prompts), size), size)]
            rounds = [batches[0], *(batches * settings["repeats"])]
            job = bar.add_task(f"batch {size}", total=len(rounds) * len(contestants))
            for number, batch in enumerate(rounds):
                turn = number % len(contestants)  # nobody always runs behind the same one
                for c in [*contestants[turn:], *contestants[:turn]]:
                    seconds, stats, _ = measure(c, evaluate, plain, batch, arguments, config.seed + number)
                    if number > 0:  # the first batch warms up
                        c.seconds.append(seconds)
                        c.stats.append(stats)
                    bar.advance(job)
            results += [figures(c, contestants[0], size) for c in contestants]
    report = {
        "machine": machine(),
        "modality": config.modality.name,
        "device": str(plain.model.device),
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "denoising_steps": plain.model.config.denoising_steps,
        "seed": config.seed,
        "settings": settings,
        "arguments": arguments,
        "baseline": PLAIN,
        "results": results,
    }
    if (settings.get("quality") or {}).get("path"):
        drawing = [Contestant(label, pipe) for label, pipe in pipes.items()]
        report["quality"] = quality(config, drawing, settings["quality"], arguments, console)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "results.json") as path:
        path.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    for name, draw in (("results.png", plot), ("steps.png", plot_steps)):
        with whole_file(folder / name) as path:
            draw(report, path)
    if "quality" in report:
        with whole_file(folder / "quality.png") as path:
            plot_quality(report, path)
    console.print(table(report))
    console.print(f"wrote {folder / 'results.json'}, results.png and steps.png", markup=False, highlight=False)


def figures(c: Contestant, plain: Contestant, batch: int) -> dict[str, Any]:
    """What a contestant's runs at one batch size come to. Calls are counted a token of one row."""
    total: Any = c.stats[0]
    for stats in c.stats[1:]:
        total = total.plus(stats)
    assert isinstance(total, LatentStats)
    ratios = [a / b for a, b in zip(plain.seconds, c.seconds, strict=True)]
    tokens, spent = total.new_tokens / batch, total.wall_seconds
    return {
        "label": c.label,
        "guarantee": total.guarantee,
        "batch": batch,
        "speed_up": statistics.median(ratios),
        "speed_ups": ratios,
        "tokens_per_second": 1 / statistics.median(c.seconds),
        "head_calls": total.head_calls / tokens,
        "ar_calls": total.target_calls / tokens,
        "draft_head_calls": total.draft_head_calls / tokens,
        "draft_ar_calls": total.draft_calls / tokens,
        "drafted_share": total.first_tokens / total.row_calls,  # of the rounds
        "acceptance_rate": total.acceptance_rate if total.proposed_tokens else None,
        "first_accepted": share(total.first_accepted, total.first_tokens),
        "bound": share(total.first_chance, total.first_tokens),
        "accepted_by_step": shares(total.accepted_by_step, total.proposed_by_step),
        "bound_by_step": shares(total.chance_by_step, total.proposed_by_step),
        "time": {k: getattr(total, f"{k}_seconds") / spent for k in ("draft", "target", "verify")},
        "runs": [s.to_dict() for s in c.stats],
    }


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def shares(parts: Sequence[float], wholes: Sequence[float]) -> list[float | None]:
    return [share(p, w) for p, w in zip(parts, wholes, strict=True)]


def table(report: Mapping[str, Any]) -> Table:
    """The printed form of a report."""
    title = f"{report['modality']}, {report['denoising_steps']} denoising steps, {report['device']}, {report['dtype']}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", overflow="fold", min_width=12)
    shown.add_column("guar-\nantee", overflow="fold")
    for column in ("batch", "speed\nup", "head\ncalls", "AR\ncalls", "draft\nhead", "draft\nAR", "acc./\nbound"):
        shown.add_column(column, justify="right", no_wrap=True)
    for r in report["results"]:
        accepted = "" if r["bound"] is None else f"{r['first_accepted']:.2f}/{r['bound']:.2f}".replace("0.", ".")
        counts = [f"{r[k]:.1f}" for k in ("head_calls", "ar_calls", "draft_head_calls", "draft_ar_calls")]
        shown.add_row(r["label"], r["guarantee"], str(r["batch"]), f"{r['speed_up']:.2f}", *counts, accepted)
    return shown


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Speed-up over the plain loop, a group of bars a contestant, a bar a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["results"]
    labels = list(dict.fromkeys(r["label"] for r in rows))
    sizes = list(dict.fromkeys(r["batch"] for r in rows))
    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(labels), 4.2), layout="constrained")
    for i, size in enumerate(sizes):
        found = {r["label"]: r["speed_up"] for r in rows if r["batch"] == size}
        places = [k + 0.8 * (i + 0.5) / len(sizes) - 0.4 for k in range(len(labels))]
        bars = axis.bar(places, [found[label] for label in labels], 0.75 / len(sizes), label=f"batch {size}")
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_ylabel("speed-up over the plain loop")
    axis.set_title(f"{report['modality']}, {report['denoising_steps']} denoising steps, {report['dtype']}", fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def plot_steps(report: Mapping[str, Any], path: Path) -> None:
    """Acceptance by denoising step beside 1 - TV, for each contestant that drafted tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    seen = [r for r in report["results"] if r["accepted_by_step"] and r["guarantee"] == "exact"]
    for r in seen:
        steps = range(1, len(r["accepted_by_step"]) + 1)
        [line] = axis.plot(steps, [float("nan") if x is None else x for x in r["accepted_by_step"]], marker=".",
                           label=f"{r['label']}, batch {r['batch']}")  # fmt: skip
        bound = [float("nan") if x is None else x for x in r["bound_by_step"]]
        axis.plot(steps, bound, color=line.get_color(), linestyle="--", linewidth=1)
    axis.set_xlabel("denoising step")
    axis.set_ylabel("accepted, of those tried (dashed: 1 - TV)")
    if seen:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
