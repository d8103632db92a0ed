"""How many tokens to draft. Every policy answers `next()` before a round and sees the outcome in `observe`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from polyspec.errors import ConfigError
from polyspec.metrics import DecodingStats

if TYPE_CHECKING:
    from polyspec.drafting.base import Context


class LengthPolicy(Protocol):
    """Draft length, chosen round by round."""

    def begin(self, context: Context) -> None:
        """Start a run."""
        ...

    def next(self) -> int:
        """The number of tokens to draft in the coming round (0: plain decoding)."""
        ...

    def keep_drafting(self, scores: Tensor) -> bool:
        """Whether a sequential drafter should go on after drawing from `scores [B, 1, V]`."""
        ...

    def observe(self, proposed: int, gained: Sequence[int], stats: DecodingStats) -> None:
        """The round's outcome: row b gained `gained[b]` tokens (0: it had finished)."""
        ...


def positive(name: str, value: int) -> int:
    """`value` if it is a whole number ≥ 1, else a ConfigError naming the knob."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number ≥ 1, got {value!r}")
    return value


class Fixed:
    """Always `length` tokens."""

    def __init__(self, length: int):
        self.length = positive("length", length)

    def begin(self, context: Context) -> None:
        pass

    def next(self) -> int:
        return self.length

    def keep_drafting(self, scores: Tensor) -> bool:
        return True

    def observe(self, proposed: int, gained: Sequence[int], stats: DecodingStats) -> None:
        pass


class Confidence(Fixed):
    """Stop drafting when no row's drafter gives its best token more than `threshold` (assisted generation's rule;
    2402.01528 discusses why draft confidence predicts acceptance). One host synchronisation a drafted token."""

    def __init__(self, threshold: float, length: int):
        super().__init__(length)
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold must lie in (0, 1), got {threshold!r}")
        self.threshold = threshold

    def keep_drafting(self, scores: Tensor) -> bool:
        return bool((scores.softmax(-1).amax(-1) > self.threshold).any())


class Adaptive(Fixed):
    """Grow if any row accepted everything, else shrink: the rule for ragged batches of BASS (2404.15778, §3.3)."""

    def __init__(self, length: int, minimum: int = 1, maximum: int = 16):
        super().__init__(length)
        self.minimum, self.maximum = positive("minimum", minimum), positive("maximum", maximum)

    def begin(self, context: Context) -> None:
        self.current, self.shrunk = self.length, False

    def next(self) -> int:
        return self.current

    def observe(self, proposed: int, gained: Sequence[int], stats: DecodingStats) -> None:
        most = max(gained) - 1
        if most >= proposed:
            self.current, self.shrunk = min(self.current + 2, self.maximum), False
        else:
            # shrink faster when the last round shrank too, but never below what the best row accepted
            step = -(-self.current // 10) + int(self.shrunk)
            self.current, self.shrunk = max(self.minimum, most, self.current - step), True


class Thompson(Fixed):
    """Draft until a draw from the Beta posterior of the acceptance rate says stop (Thompson sampling as in EESD,
    2402.09320): after i tokens go on with probability α ~ Beta(1 + accepted, 1 + rejected)."""

    def __init__(self, length: int, seed: int = 0):
        super().__init__(length)
        self.seed = seed

    def begin(self, context: Context) -> None:
        self.random, self.accepted, self.rejected = np.random.default_rng(self.seed), 0.0, 0.0

    def next(self) -> int:
        count = 1
        while count < self.length:
            alpha = self.random.beta(1 + self.accepted, 1 + self.rejected)
            if self.random.random() > alpha:
                break
            count += 1
        return count

    def observe(self, proposed: int, gained: Sequence[int], stats: DecodingStats) -> None:
        for gain in gained:
            if gain and proposed:
                self.accepted += gain - 1
                self.rejected += gain - 1 < proposed


# seconds of a target call by number of tokens, measured once per (model, dtype, device, streams)
_COSTS: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, dict[int, float]]] = weakref.WeakKeyDictionary()
SIZES = (1, 2, 3, 5, 9, 17, 33)


def call_costs(context: Context) -> dict[int, float]:
    """Seconds of a forward of 1, 2, 3, 5, 9, … tokens behind the present cache: the fastest of three, cached a model."""
    target = context.target
    kept = context.sequences.cached
    streams = len(target.cache_lengths)
    bucket = int(np.log2(max(max(kept), 1) + 64))  # cost grows slowly with the context: measured anew each doubling
    known = _COSTS.setdefault(target.model, {}).setdefault((str(target.model.dtype), str(target.device), streams, bucket), {})
    if not known:
        token = context.sequences.tail(1)
        for repeat in range(3):
            for size in SIZES:
                start = time.perf_counter()
                logits = target.forward(token.expand(-1, size)).logits
                context.processing.scores(logits, context.sequences, token.expand(-1, size - 1))[0, 0, 0].item()
                spent = time.perf_counter() - start
                known[size] = spent if repeat == 0 else min(known[size], spent)
                target.rollback(kept)
    return known


class Auto(Fixed):
    """Picks the length that yields most tokens a second, zero included.

    Acceptance is learnt online, per position in the draft (a discounted count of how often position i was kept given
    that everything before it was); the target's cost of 1, 2, 4, … tokens is measured once a model; the drafter's cost
    is measured as it runs. Expected tokens of length n: 1 + Σ_{i≤n} Π_{j≤i} α_j. While zero wins, a short draft is
    tried now and then, at intervals that double, so that a workload that turns predictable is noticed.
    """

    def __init__(self, length: int = 16, decay: float = 0.95):
        super().__init__(length)
        self.decay = decay

    def begin(self, context: Context) -> None:
        self.context = context
        self.costs: dict[int, float] | None = None
        self.kept = np.full(self.length, 1.2)
        self.tried = np.full(self.length, 2.0)
        self.draft_cost: float | None = None  # seconds of a draft: fixed part and a token's share, by least squares
        self.per_token = 0.0
        self.last_seconds = 0.0
        self.pause, self.wait = 0, 8

    def next(self) -> int:
        if self.costs is None:
            self.costs = call_costs(self.context)
            self.curve = np.interp(np.arange(1, self.length + 2), list(self.costs), list(self.costs.values()))
        if self.pause > 0:
            self.pause -= 1
            return 0
        alpha = self.kept / self.tried
        tokens = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(alpha))])
        count = np.arange(self.length + 1)
        seconds = self.curve + np.where(count > 0, (self.draft_cost or 0.0) + self.per_token * count, 0.0)
        best = int(np.argmax(tokens / seconds))
        if best == 0:
            self.pause, self.wait = self.wait, min(self.wait * 2, 128)
            return 1
        self.wait = 8
        return best

    def observe(self, proposed: int, gained: Sequence[int], stats: DecodingStats) -> None:
        if not proposed:
            self.last_seconds = stats.draft_seconds
            return
        spent, self.last_seconds = stats.draft_seconds - self.last_seconds, stats.draft_seconds
        if stats.target_calls > 1:  # the first round's draft includes its own start-up
            share = spent / proposed
            self.per_token = share if not self.per_token else 0.8 * self.per_token + 0.2 * share
        accepted = np.array([g - 1 for g in gained if g])
        reach = min(proposed, self.length)
        self.kept *= self.decay
        self.tried *= self.decay
        for i in range(reach):
            self.tried[i] += np.sum(accepted >= i)
            self.kept[i] += np.sum(accepted > i)
        # positions beyond the draft share the rate of what was seen, so that growing is never ruled out
        rate = (self.kept[:reach].sum() + 0.6) / (self.tried[:reach].sum() + 1)
        self.kept[reach:] = rate * self.tried[reach:]
