"""What a run did: counts, rates and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from polyspec.verification import LatentVerdict


@dataclass(slots=True)
class DecodingStats:
    """Counts and seconds of one run of a recipe. Times are wall-clock seconds; rates are per row.

    new_tokens counts every row's committed tokens; target_calls counts forward passes of the target after the prompt's.
    A row takes part in a call until it has finished: row_calls is the sum over calls of rows still running.
    draft_ratio: the drafter's parameters over the target's, 0 for a drafter that has none.
    audio_seconds is how much speech was made, first_output_seconds when the first of it could be heard; 0 elsewhere.
    """

    recipe: str = ""
    guarantee: str = ""
    new_tokens: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    row_calls: int = 0
    proposed_tokens: int = 0
    scored_tokens: int = 0
    accepted_tokens: int = 0
    draft_ratio: float = 0.0
    wall_seconds: float = 0.0
    prefill_seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    audio_seconds: float = 0.0
    first_output_seconds: float = 0.0
    accepted_by_position: list[int] = field(default_factory=list)
    proposed_by_position: list[int] = field(default_factory=list)

    @property
    def tokens_per_call(self) -> float:
        """Block efficiency: tokens a running row gains from one target call."""
        return self.new_tokens / self.row_calls if self.row_calls else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafted tokens over proposed ones."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else 0.0

    @property
    def mbsu(self) -> float:
        """Memory-bound speed-up (2404.08856): tokens per call over what a call and its drafts cost, 1 + cN, where reading
        the weights is all that costs; c is the draft ratio, N the drafter's calls a target call."""
        calls = self.draft_calls / self.target_calls if self.target_calls else 0.0
        return self.tokens_per_call / (1 + self.draft_ratio * calls)

    @property
    def token_rate(self) -> float:
        """New tokens a second, of all rows together."""
        return self.new_tokens / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def real_time_factor(self) -> float:
        """Seconds it took to make a second of audio; 0 where none was made."""
        return self.wall_seconds / self.audio_seconds if self.audio_seconds else 0.0

    def plus(self, other: DecodingStats) -> DecodingStats:
        """Counts and seconds of this run and another of the same recipe together."""
        total = replace(self)
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if isinstance(a, list):
                setattr(total, f.name, [x + y for x, y in zip_longest(a, b, fillvalue=0)])
            elif f.name != "draft_ratio" and not isinstance(a, str):
                setattr(total, f.name, a + b)
        return total

    def record(self, proposed: int, gained: list[int], scored: int | None = None) -> None:
        """Count a round: drafts `proposed` tokens deep, after which row b had `gained[b]` more (0: not running).

        scored: how many drafted tokens the target scored in a row, if more than `proposed` (a tree's nodes)."""
        accepted = [g - 1 for g in gained if g > 0]
        self.target_calls += 1
        self.new_tokens += sum(gained)
        self.row_calls += len(accepted)
        self.proposed_tokens += proposed * len(accepted)
        self.scored_tokens += (proposed if scored is None else scored) * len(accepted)
        self.accepted_tokens += sum(accepted)
        while len(self.proposed_by_position) < proposed:
            self.proposed_by_position.append(0)
            self.accepted_by_position.append(0)
        for position in range(proposed):
            # a position counts as tried only where everything before it was accepted
            self.proposed_by_position[position] += sum(a >= position for a in accepted)
            self.accepted_by_position[position] += sum(a > position for a in accepted)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to `<what>_seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, f"{what}_seconds", getattr(self, f"{what}_seconds") + time.perf_counter() - start)

    def to_dict(self) -> dict[str, object]:
        """All fields and rates, JSON-ready."""
        rates = ("tokens_per_call", "acceptance_rate", "mbsu", "token_rate", "real_time_factor")
        return {**asdict(self), **{rate: getattr(self, rate) for rate in rates}}


@dataclass(slots=True)
class LatentStats(DecodingStats):
    """Of a run that draws continuous tokens: calls of the diffusion heads too, and acceptance by denoising step.

    A step of a drafted token counts as tried where every token and step before it has held; chance_by_step sums over these
    the probability that it would hold, 1 - TV for an exact rule, and first_chance over all first drafted tokens that of the
    whole token, Π(1 - TV), which no exact rule exceeds.
    """

    head_calls: int = 0
    draft_head_calls: int = 0
    accepted_by_step: list[int] = field(default_factory=list)
    proposed_by_step: list[int] = field(default_factory=list)
    chance_by_step: list[float] = field(default_factory=list)
    first_tokens: int = 0
    first_accepted: int = 0
    first_chance: float = 0.0

    def record_steps(self, verdict: LatentVerdict, gained: list[int]) -> list[list[float]]:
        """Count the steps of a round in which row b gained `gained[b]` tokens; returns the chance of each drafted token of
        the rows that still ran."""
        _, length, steps = verdict.kept.shape
        running = [b for b, gain in enumerate(gained) if gain]
        if length == 0 or not running:
            return []
        for name in ("accepted_by_step", "proposed_by_step", "chance_by_step"):
            setattr(self, name, getattr(self, name) or [0] * steps)
        kept, chance = verdict.kept[running], verdict.chance[running].double()
        held = kept.flatten(1).cumprod(1)
        tried = held.roll(1, 1)
        tried[:, 0] = 1
        counts = torch.stack([held.double(), tried.double(), tried * chance.flatten(1)]).view(3, -1, steps).sum(1)
        *found, tokens = [*counts.tolist(), chance.prod(-1).tolist()]
        for t in range(steps):
            self.accepted_by_step[t] += round(found[0][t])
            self.proposed_by_step[t] += round(found[1][t])
            self.chance_by_step[t] += found[2][t]
        self.first_tokens += len(running)
        self.first_accepted += sum(gained[b] > 1 for b in running)
        self.first_chance += sum(row[0] for row in tokens)
        return tokens
