"""A report of several benches as one HTML page that needs no other file: tables, plots, pictures, sounds."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from polyspec.outputs import Audio, Result

STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child,td.text,th.text{text-align:left}img{max-width:100%}"
    "figure{display:inline-block;margin:.5em 1em .5em 0}figure img{width:192px;image-rendering:pixelated}"
    "code{background:#f4f4f4;padding:.1em .3em}small{color:#666}"
)
COLUMNS = { # what a result may hold, and its heading
    "label": "",
    "guarantee": "guarantee",
    "batch": "batch",
    "speed_up": "speed-up",
    "speed_up_over_plain_loop": "over the plain loop",
    "tokens_per_call": "tokens a call",
    "mbsu": "MBSU",
    "tokens_scored_per_call": "tokens scored a call",
    "head_calls": "head calls a token",
    "ar_calls": "AR calls a token",
    "ceiling": "ceiling",
    "efficiency": "efficiency",
    "tokens_per_second": "tokens/s",
    "spent": "% of the time in prefill/target/draft/verify/rest",
    "accepted_of_tried": "accepted",
    "one_minus_tv": "1 − TV",
    "first_accepted": "accepted",
    "bound": "Π(1 − TV)",
    "same_as_plain_loop": "the plain loop's output",
}  # fmt: skip
TEXT = ("label", "guarantee")
TOLD = ("label", "speed_up", "speed_up_over_plain_loop", "tokens_per_second")


def page(command: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """The whole page. Of a part: name, report (as a bench writes it), plots (files), left_out, examples (name, Result)."""
    body = "".join(section(part) for part in parts)
    first = parts[0]["report"]["machine"] if parts else {}
    where = ", ".join(f"{k} {v}" for k, v in first.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>polyspec</title><style>{STYLE}</style>'
        f"<h1>polyspec</h1><p><code>{html.escape(command)}</code></p><p>{html.escape(where)}</p>{body}</html>\n"
    )


def section(part: Mapping[str, Any]) -> str:
    """A part's heading, examples, tables, plots, and what was left out."""
    report = part["report"]
    found = [f"<h2>{html.escape(part['name'])}</h2>"]
    found.append(f"<p><small>{report['device']}, {report['dtype']}, seed {report['seed']}</small></p>")
    found += [example(name, result) for name, result in part["examples"]]
    for one in report.get("sections") or [{"name": "", "results": report["results"]}]:
        found += [f"<h3>{html.escape(one['name'])}</h3>" if one["name"] else "", table(one["results"])]
    found += [table([{"label": k, **v} for k, v in report["quality"].items()])] if report.get("quality") else []
    found += [picture(Path(p).read_bytes(), Path(p).stem) for p in part["plots"]]
    if part["left_out"]:
        reasons = "".join(f"<li>{html.escape(k)}: {html.escape(v)}</li>" for k, v in part["left_out"].items())
        found.append(f"<p>Not measured:</p><ul>{reasons}</ul>")
    return "".join(found)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results as rows, with the columns that any of them fills."""
    names = [c for c in COLUMNS if any(r.get(c) not in (None, "", {}) for r in results)]
    if "guarantee" not in results[0]:  # measures of quality, which have names of their own
        names += [c for c in results[0] if c not in COLUMNS]
    head = "".join(f"<th{kind(c)}>{html.escape(COLUMNS.get(c, c))}</th>" for c in names)
    rows = "".join("<tr>" + "".join(f"<td{kind(c)}>{cell(shown(r, c))}</td>" for c in names) + "</tr>" for r in results)
    return f"<table><tr>{head}</tr>{rows}</table>"


def shown(result: Mapping[str, Any], column: str) -> Any:
    """A result's entry; transformers' generate, which guarantees nothing here, does not tell how many calls it made."""
    known = result.get("guarantee") != "" or column in TOLD
    return result.get(column) if known else None


def kind(column: str) -> str:
    return ' class="text"' if column in TEXT else ""


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return "/".join(f"{100 * part:.0f}" for part in value.values())
    return f"{value:.2f}" if isinstance(value, float) else html.escape(str(value))


def example(name: str, result: Result) -> str:
    """An output to look at, to hear or to read, with the seconds that it took."""
    output, s = result.outputs[0], result.stats
    caption = f"{name}: {s.wall_seconds:.2f} s, {s.target_calls} target calls ({s.guarantee})"
    if isinstance(output, Image.Image):
        data = io.BytesIO()
        output.save(data, format="png")
        shown = picture(data.getvalue(), name)
    elif isinstance(output, Audio):
        import soundfile

        data = io.BytesIO()
        soundfile.write(data, output.waveform.T.float().numpy(), output.sample_rate, format="WAV")
        shown = f'<audio controls src="data:audio/wav;base64,{base64.b64encode(data.getvalue()).decode()}"></audio>'
    elif isinstance(output, list):
        items = "".join(f"<li>{html.escape(r.title or str(r.item_id))} ({r.score:.2f})</li>" for r in output)
        shown = f"<ol>{items}</ol>"
    else:
        shown = f"<blockquote>{html.escape(str(output))}</blockquote>"
    return f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>"


def picture(data: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
