"""The figures of `polyspec task=bench`, from what its runs took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyspec.metrics import DecodingStats


@dataclass(slots=True)
class Contestant:
    """One line of the table: its label, how to run it, and what its runs took."""

    label: str
    pipe: Any  # None: transformers' own generate
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of this contestant alone
    seconds: list[float] = field(default_factory=list)
    stats: list[DecodingStats] = field(default_factory=list)
    overlap: tuple[float, float] | None = None  # of drawn drafts: share accepted, 1 − TV(p, q)
    outputs: list[list[str]] = field(default_factory=list)  # fingerprints of each run's outputs

    def only(self, runs: Sequence[int]) -> Contestant:
        """The same with some of the runs alone."""
        kept = {name: [getattr(self, name)[i] for i in runs] for name in ("seconds", "stats", "outputs")}
        return replace(self, **kept)

    @property
    def tokens_per_call(self) -> float:
        """Over all runs."""
        calls = sum(s.row_calls for s in self.stats)
        return sum(s.new_tokens for s in self.stats) / calls if calls else 1.0

    @property
    def mbsu(self) -> float:
        """Memory-bound speed-up (2404.08856) over all runs: tokens per call where reading weights is all that costs."""
        calls = sum(s.target_calls for s in self.stats)
        drafts = sum(s.draft_ratio * s.draft_calls for s in self.stats)
        return self.tokens_per_call / (1 + drafts / calls) if calls else 1.0

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


def results(
    contestants: Sequence[Contestant],
    rates: Mapping[str, float],
    plain: Any,
    batch: Sequence[str],
    arguments: Mapping[str, Any],
    large_target: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One dict a contestant: ratios against transformers and the plain loop, ceiling, efficiency, acceptance.

    rates: tokens a second of each if nothing but its target calls took time, over all prompts."""
    reference, loop = contestants[0], contestants[1]
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
                "mbsu": c.mbsu,
                "tokens_scored_per_call": c.tokens_scored,
                "ceiling": ceiling,
                "efficiency": statistics.median(decoding_ratios(c, loop)) / ceiling,
                "tokens_per_second": 1 / statistics.median(c.seconds),
                "acceptance_rate": sum(s.accepted_tokens for s in c.stats)
                / max(1, sum(s.proposed_tokens for s in c.stats)),
                "accepted_of_tried": None if c.overlap is None else c.overlap[0],
                "one_minus_tv": None if c.overlap is None else c.overlap[1],
                "accepted_by_position": positions(c.stats),
                "same_as_plain_loop": same_outputs(c, loop, do_sample),
                "at_large_target": at_large_target(c, width, large_target) if large_target else None,
                "spent": spent(c.stats),
                "runs": [s.to_dict() for s in c.stats],
                "seconds_per_token": c.seconds,
            }
        )
    return rows


def decoding_ratios(c: Contestant, loop: Contestant) -> list[float]:
    """Run by run, how much faster `c` decodes than the plain loop: its seconds a token over c's, without what the plain loop
    spent before decoding and behind it."""
    ratios = []
    for plain, ours, before, after in zip(loop.stats, c.stats, loop.seconds, c.seconds, strict=True):
        decoding = plain.target_seconds + plain.draft_seconds + plain.verify_seconds
        rest = max(plain.wall_seconds - decoding, 0.0)
        spent = [max(s * n.new_tokens - rest, 1e-9) / max(n.new_tokens, 1) for s, n in ((before, plain), (after, ours))]
        ratios.append(spent[0] / spent[1])
    return ratios


def spent(stats: Sequence[DecodingStats]) -> dict[str, float]:
    """The shares of the time that a recipe's parts took; `rest` is the loop's own, and what is made of the tokens."""
    whole = sum(s.wall_seconds for s in stats)
    parts = {part: sum(getattr(s, f"{part}_seconds") for s in stats) for part in ("prefill", "target", "draft", "verify")}
    found = {part: seconds / whole for part, seconds in parts.items()} if whole else {}
    return {**found, "rest": 1 - sum(found.values())} if found else {}


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
    own, plain = ([o for run in runs for o in run] for runs in (c.outputs, loop.outputs))
    if c.pipe is None or c is loop or c.stats[0].guarantee != "exact" or len(own) != len(plain):
        return None
    if do_sample and c.pipe.method.draws != "coupled":
        return None
    return sum(a == b for a, b in zip(own, plain, strict=True)) / max(1, len(own))


def at_large_target(c: Contestant, rows: int, model: Mapping[str, Any]) -> float:
    """What the tokens per call would be worth on a target whose weights take longer to read than to use.

    model: `ridge`, the tokens of all rows whose arithmetic takes as long as reading the weights; both are added up, so
    a call of N tokens in each of `rows` rows costs `(ridge + rows·N) / (ridge + rows)` calls of one token.
    """
    ridge = float(model["ridge"])
    return c.tokens_per_call * (ridge + rows) / (ridge + rows * c.tokens_scored)


def streams(plain: Any, batch: Sequence[str], arguments: Mapping[str, Any]) -> int:
    """Rows in a target call: two a prompt under guidance."""
    scale = plain.settings(**arguments).get("guidance_scale") if hasattr(plain, "settings") else arguments.get("guidance_scale")
    return len(batch) * (2 if scale not in (None, 1, 1.0) else 1)
