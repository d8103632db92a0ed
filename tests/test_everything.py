"""The report of all benches: one page that holds tables, pictures, sounds and lists in itself."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import polyspec
from polyspec.bench.everything import ready
from polyspec.bench.figures import Contestant, decoding_ratios, spent
from polyspec.bench.page import page, table
from polyspec.metrics import DecodingStats
from polyspec.outputs import Audio, Recommendation, Result

ROW = {"label": "sjd", "guarantee": "exact", "speed_up": 2.345, "one_minus_tv": None}


class Tags(HTMLParser):
    """Raises where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def part(output: object, plots: list[str]) -> dict[str, object]:
    report = {"device": "cpu", "dtype": "float32", "seed": 0, "machine": {"threads": 1}, "results": [ROW]}
    result = Result([output], DecodingStats(recipe="sjd", guarantee="exact", wall_seconds=1.5, target_calls=7))
    return {"name": "a <part>", "report": report, "plots": plots, "left_out": {"gsd": "needs a & b"},
            "examples": [("plain", result)]}  # fmt: skip


@pytest.mark.parametrize(
    ("output", "holds"),
    [
        (Image.new("RGB", (4, 4), "red"), 'src="data:image/png;base64,'),
        (Audio(torch.zeros(1, 800), 8000), 'src="data:audio/wav;base64,'),
        ([Recommendation(3, "A <film>", -1.0)], "<li>A &lt;film&gt; (-1.00)</li>"),
        ("1 < 2", "<blockquote>1 &lt; 2</blockquote>"),
    ],
)
def test_a_page_needs_no_other_file(output: object, holds: str, tmp_path: Path) -> None:
    plot = tmp_path / "results.png"
    Image.new("RGB", (8, 8)).save(plot)
    found = page("polyspec task=bench", [part(output, [str(plot)])])
    tags = Tags()
    tags.feed(found)
    assert tags.open == [] and "table" in tags.seen
    assert holds in found and "a &lt;part&gt;" in found and "needs a &amp; b" in found and "1.50 s, 7 target calls" in found
    assert not re.search(r'(src|href)="(?!data:)', found)
    assert base64.b64encode(plot.read_bytes()).decode() in found


def test_a_table_has_the_columns_that_are_filled() -> None:
    found = table([ROW, {**ROW, "label": "jacobi", "efficiency": 0.5}])
    assert "2.35" in found or "2.34" in found
    assert "<th>efficiency</th>" in found and "1 − TV" not in found and "% of the time" not in found
    assert "<td>0/50/25/5/20</td>" in table([{**ROW, "spent": {"a": 0, "b": 0.5, "c": 0.25, "d": 0.05, "e": 0.2}}])


def test_where_the_time_went_adds_up() -> None:
    stats = [DecodingStats(wall_seconds=2.0, target_seconds=1.0, draft_seconds=0.5, verify_seconds=0.1)] * 2
    assert spent(stats) == pytest.approx({"prefill": 0, "target": 0.5, "draft": 0.25, "verify": 0.05, "rest": 0.2})
    assert spent([DecodingStats()]) == {}


def test_efficiency_is_of_decoding_not_of_taking_in_the_prompt() -> None:
    plain = DecodingStats(new_tokens=10, wall_seconds=9, prefill_seconds=3, target_seconds=5, verify_seconds=1)
    fast = DecodingStats(new_tokens=10, wall_seconds=5, prefill_seconds=3, target_seconds=1.5, verify_seconds=0.5)
    loop, ours = Contestant("plain", None, seconds=[0.9], stats=[plain]), Contestant("", None, seconds=[0.5], stats=[fast])
    assert decoding_ratios(ours, loop) == pytest.approx([3.0])
    assert decoding_ratios(loop, loop) == [1.0]
    ours.stats, ours.seconds = [DecodingStats(new_tokens=5)], [1.0]  # other tokens: seconds a token count
    assert decoding_ratios(ours, loop) == pytest.approx([0.6 / 0.4])


def test_recipes_without_a_drafter_are_named_with_the_reason() -> None:
    plain = polyspec.pipeline("recommendation", recipe="autoregressive", dtype="float32", device="cpu")
    able, unable = ready("recommendation", plain.loaded)
    assert "atspeed_s" in able and not {"autoregressive"} & {*able, *unable}


def test_an_unknown_part_is_said_before_anything_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "polyspec", "task=bench", "modality=all", "bench.only=[speach]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "unknown part 'speach'; did you mean 'speech'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_report_of_a_modality(tmp_path: Path) -> None:
    given = ["bench.only=[recommendation]", "bench.count=2", "dtype=float32", f"bench.output={tmp_path}/report"]
    done = subprocess.run([sys.executable, "-m", "polyspec", "task=bench", "modality=all", *given], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (found,) = report["parts"]
    assert {"transformers", "plain loop", "atspeed_s"} <= {r["label"] for r in found["report"]["results"]}
    assert "atspeed_s" in (tmp_path / "report" / "report.html").read_text()
