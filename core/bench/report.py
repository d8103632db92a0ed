"""What a bench run leaves: a table for the terminal, lines below it, and plots."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table


def sections(report: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, results) of every part that was measured apart: batch sizes, kinds of prompts; a single one has no name."""
    return [(p["name"], p["results"]) for p in report.get("sections", ())] or [("", report["results"])]


def table(report: Mapping[str, Any], name: str, results: list[dict[str, Any]]) -> Table:
    """The printed form of a section of a report."""
    title = ", ".join(part for part in (report["modality"], report["device"], report["dtype"], name) if part)
    # narrow enough for a terminal of 80 columns
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    overlaps = any(r["one_minus_tv"] is not None for r in results)
    drafts = any(r["mbsu"] != r["tokens_per_call"] for r in results)  # by a model whose weights must be read
    columns = ["speed\nup", "over\nloop", "tok/\ncall", "nodes\n/call", "ceil-\ning", "effi-\ncient", "tok/s"]
    columns[3:3] = ["MBSU"] * drafts
    shown.add_column("", overflow="fold", min_width=12)
    shown.add_column("guar-\nantee", overflow="fold")
    for column in [*columns, *(["kept/\n1−TV"] if overlaps else [])]:
        shown.add_column(column, justify="right", no_wrap=True)
    for r in results:
        own = r["guarantee"] != ""  # transformers' generate does not tell how many calls it made
        figures = (
            f"{r['speed_up']:.2f}",
            f"{r['speed_up_over_plain_loop']:.2f}",
            f"{r['tokens_per_call']:.2f}" if own else "",
            *([f"{r['mbsu']:.2f}" if own else ""] * drafts),
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


def notes(report: Mapping[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """Lines below a table: outputs equal to the plain loop's, and what the tokens per call are worth elsewhere."""
    lines = []
    same = {r["label"]: r["same_as_plain_loop"] for r in results if r["same_as_plain_loop"] is not None}
    if same:
        shares = ", ".join(f"{label} {share:.0%}" for label, share in same.items())
        lines.append(f"outputs identical to the plain loop's, of those that should be: {shares}")
    timed = [r for r in results if r["guarantee"] and r.get("spent")]
    if timed:
        shares = ", ".join(f"{r['label']} {'/'.join(f'{100 * v:.0f}' for v in r['spent'].values())}" for r in timed)
        lines.append(f"percent of the time for {'/'.join(timed[0]['spent'])}: {shares}")
    if large := report["settings"].get("large_target"):
        worth = [r for r in results if r["guarantee"]]
        shares = ", ".join(f"{r['label']} {r['at_large_target']:.2f}×" for r in worth)
        lines.append(f"the same tokens per call on {large['name']} (stated, not measured): {shares}")
    return lines


def plot_positions(report: Mapping[str, Any], path: Path) -> None:
    """Acceptance by position in the draft or window, a line a contestant, a plot a section."""
    figure, axes = blank(report, 7)
    for axis, (name, results) in zip(axes, sections(report), strict=True):
        for r in results:
            if shares := r["accepted_by_position"]:
                axis.plot(range(1, len(shares) + 1), shares, marker=".", label=r["label"])
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("position")
        axis.set_ylabel("accepted, of those tried")
        axis.set_ylim(0, 1.02)
        axis.legend(fontsize=8)
    save(figure, path)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Speed-up beside tokens per call and ceiling, one group of bars a contestant, a plot a section."""
    figure, axes = blank(report, 2 + 1.6 * len(report["results"]))
    bars = (
        ("speed_up", "speed-up over transformers"),
        ("ceiling", "ceiling"),
        ("tokens_per_call", "tokens per call"),
    )
    for axis, (name, rows) in zip(axes, sections(report), strict=True):
        for offset, (key, label) in enumerate(bars):
            drawn = axis.bar(
                [i + 0.27 * (offset - 1) for i in range(len(rows))], [r[key] for r in rows], 0.25, label=label
            )
            axis.bar_label(drawn, fmt="%.2f", fontsize=7)
        axis.set_xticks(range(len(rows)), [f"{r['label']}\n{r['guarantee']}" for r in rows], fontsize=8)
        axis.axhline(1, color="grey", linewidth=0.8)
        where = f"{report['modality']}, {report['dtype']} on {report['machine']['processor']}"
        axis.set_title(", ".join(part for part in (where, name) if part), fontsize=9)
        axis.legend(fontsize=8)
    save(figure, path)


def blank(report: Mapping[str, Any], width: float) -> tuple[Any, Any]:
    """A figure and its axes, one below the other for the sections of a report."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(sections(report))
    figure, axes = plt.subplots(count, 1, figsize=(width, 4.2 * count), layout="constrained", squeeze=False)
    return figure, axes[:, 0]


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

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
        axis.set_xlabel(f"speed-up over {report.get('baseline', 'transformers')}")
        axis.margins(0.15)
        axis.set_ylabel(name)
    save(figure, path)


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
