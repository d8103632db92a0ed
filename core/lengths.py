"""How many tokens to draft. Every policy answers `next()` before a round and sees the outcome in `observe`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
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

    def budget(self, values: Tensor) -> int:
        """How many of a tree's likeliest nodes to check, whose paths have log-probabilities `values [B, M]`, falling."""
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

    def budget(self, values: Tensor) -> int:
        return values.shape[1]

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
        if minimum > maximum:
            raise ConfigError(f"minimum must not exceed maximum, got {minimum} and {maximum}")

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


# time of a target call by number of tokens, in calls of one token; measured once per (model, dtype, device, streams)
_COSTS: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, str, int], dict[int, float]]] = (
    weakref.WeakKeyDictionary()
)
SIZES = (1, 2, 3, 5, 9, 17, 33)
ENOUGH, MEASURING = 2.5, 1.0
NOMINAL_CALL = 0.015  # what one more token adds to a target call, in calls of one token
NOMINAL_DRAFT = 0.03  # what a drafter's call costs beside its share of parameters
PRIOR, PRIOR_DRAFTS = 0.7, 3  # the acceptance rate that so many drafts are taken to have had before any was seen
SHORTEST_WAIT, LONGEST_WAIT = 4.0, 256.0  # rounds without a draft between two tries, while drafting does not pay
DRAWN = 6  # drafts' worth of the rate of all positions in that of each: a few failures there are not held for good
FEW_TRIES = 16  # drafts, discounted, of all rows; before that drafting is not given up for a streak of bad luck
TRIES = 0.02  # of the time may go into them
CLEAR_GAIN = 1.5  # where drafting seems to gain less, a plain round now and then shows whether costs are as measured
EARLY_CHECK, LATER_CHECK = 8, 64  # rounds between two of these, of the first three and later


def call_costs(context: Context, most: int) -> dict[int, float]:
    """What forwards of 1, 2, 3, 5, 9, … tokens (steps, where the target has such) cost, up to `most`, behind the present
    cache, in forwards of one token.

    Interleaved passes, of which the fastest counts, three or as many as `MEASURING` seconds allow, and no number of tokens
    costs more than a larger one; measured once a model and process. Sizes beyond one that costs more than `ENOUGH` are taken
    from the line through the last two. Ratios, because a machine's speed drifts more than they do.
    """
    target = context.target
    key = (str(target.model.dtype), str(target.device), len(target.cache_lengths))
    known = _COSTS.setdefault(target.model, {}).setdefault(key, {})
    sizes = [n for n in SIZES if n < 2 * most]
    if set(sizes) <= set(known):
        return known
    token, kept = context.sequences.tail(1), context.sequences.cached
    seconds: dict[int, float] = {}
    begun = time.perf_counter()
    for turn in range(3):
        if turn and time.perf_counter() - begun > MEASURING:
            break
        for size in sizes:
            start = time.perf_counter()
            tokens = token.expand(-1, size * target.step)
            logits = target.forward(tokens).logits
            context.processing.scores(logits, context.sequences, tokens[:, 1:])[0, 0, 0].item()
            seconds[size] = min(seconds.get(size, float("inf")), time.perf_counter() - start)
            target.rollback(kept)
            if size > 1 and seconds[size] > ENOUGH * seconds[1]:
                sizes = [n for n in sizes if n <= size]
                break
    fastest = float("inf")
    for size in sorted(seconds, reverse=True):  # noise only adds: fewer tokens never take longer than more do
        fastest = seconds[size] = min(seconds[size], fastest)
    known.update({n: s / seconds[1] for n, s in seconds.items()})
    known.update({n: along_line(known, n) for n in SIZES if n < 2 * most and n not in known})
    return known


def along_line(costs: Mapping[int, float], tokens: int) -> float:
    """Costs by number of tokens, on the line through the two largest numbers."""
    low, high = sorted(costs)[-2:]
    return costs[high] + max(costs[high] - costs[low], 0.0) / (high - low) * (tokens - high)


def counts(stats: DecodingStats) -> tuple[float, ...]:
    """What `Auto` takes the difference of round by round."""
    return (
        stats.draft_seconds,
        stats.target_seconds,
        stats.verify_seconds,
        stats.scored_tokens,
        stats.row_calls,
        stats.draft_calls,
    )


class Auto(Fixed):
    """Picks the length that yields most tokens for the time, zero included.

    Acceptance is learnt online, per position in the draft: a discounted count of how often position i was kept given
    that everything before it was. The target's cost of 1, 2, 4, … tokens is measured once a model; the drafter's is
    taken as it runs, relative to the target's in the same round, and so, on a CPU, is that of verifying. How many tokens a
    draft of length n makes the target score is seen as it runs too: n of a chain, all nodes of a tree that deep. Expected
    tokens of length n: 1 + Σ_{i≤n} Π_{j≤i} α_j.
    Of a tree it has the m likeliest nodes checked for which 1 + r Σ_{i≤m} V_i over the round's cost is greatest: V_i the
    drafter's probability of a node's path, r how many tokens were accepted for one that such sums promised.
    While zero wins, one short draft is tried now and then, so that a workload that turns predictable is noticed: at
    intervals that double, and so seldom that it costs 2 % of the time at most.
    What was measured before the run is put right as it goes, on a CPU: where rounds with a draft and without follow on each
    other, their target calls tell how far the ratio of the costs was out.

    Where the output depends on how rounds are cut and a seed was given, so that it has to come out the same again, costs
    are the nominal ones (`NOMINAL_CALL`, and `NOMINAL_DRAFT` for each of the drafter's calls, which are counted as it runs:
    one a token, one a block, or none) and nothing is carried over from earlier runs.
    """

    def __init__(self, length: int = 16, decay: float = 0.98):
        super().__init__(length)
        if not 0 < decay <= 1:
            raise ConfigError(f"decay must lie in (0, 1], got {decay!r}")
        self.decay = decay
        self.kept, self.tried = np.zeros(self.length), np.zeros(self.length)
        self.draft = np.zeros(6)  # discounted sums of 1, n, n², cost, n·cost and slope over rounds with a draft
        self.scored = np.zeros(self.length + 1)  # tokens scored for a draft of length n when last seen, 0: never yet
        self.promised = np.ones(2)  # discounted sums over trees: tokens accepted, Σ V of their nodes
        self.verified = np.zeros(2)  # discounted sums of the cost of verifying and of tokens verified
        self.wait = np.full(1, SHORTEST_WAIT)  # rounds between two tries while zero wins
        self.rows = np.ones(1)  # that drafted last
        self.out = np.zeros(2)  # discounted: turns from plain rounds to drafts or back, log of how far costs were out

    def begin(self, context: Context) -> None:
        self.context = context
        self.nominal = context.draws.fixed_rounds
        self.costs: dict[int, float] | None = {1: 1.0, 1001: 1 + 1000 * NOMINAL_CALL} if self.nominal else None
        if self.nominal:
            learnt = (self.kept, self.tried, self.draft, self.scored)
            self.kept, self.tried, self.draft, self.scored = (np.zeros_like(x) for x in learnt)
            self.promised, self.verified, self.out = np.ones(2), np.zeros(2), np.zeros(2)
            self.wait, self.rows = np.full(1, SHORTEST_WAIT), np.ones(1)
        else:  # what earlier runs taught is a start, worth ten rounds; in place, for a run's copy shares it
            trust = min(1.0, 10 / max(self.draft[0], 1e-9))
            for learnt in (self.kept, self.tried, self.draft, self.verified):
                learnt *= trust
        # elsewhere the target's own time is spent where the host waits for it, that is while verifying
        self.host = context.target.device.type == "cpu" and not self.nominal
        # log of the seconds by cost of the latest target calls, of rounds with a draft or not
        self.recent: dict[bool, float] = {}
        self.drafted, self.unchecked = False, 0
        self.before = (0.0, 0.0, 0.0, 0, 0, 0)
        self.count, self.sum = 0, 0.0  # of the round under way: the draft's length, Σ V of the nodes checked
        self.pause = int(self.wait[0]) if self.tried.any() else 0

    def next(self) -> int:
        self.before, self.sum = counts(self.context.stats), 0.0
        self.count = self.choose()
        return self.count

    def budget(self, values: Tensor) -> int:
        running = self.context.sequences.running_tensor[: len(values), None]
        sums = torch.where(running, values.exp(), 0).cumsum(1).sum(0) / running.sum()
        sums = np.array(sums.tolist())
        nodes = np.arange(1, len(sums) + 1)
        cost = self.check_cost(1 + nodes) + self.draft_cost(np.full(len(nodes), self.count))
        best = int(np.argmax((1 + self.promised[0] / self.promised[1] * sums) / cost))
        self.sum = float(sums[best])
        return best + 1

    def choose(self) -> int:
        if self.costs is None:
            self.costs = call_costs(self.context, self.length + 1)
        count = np.arange(self.length + 1)
        tokens = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(self.acceptance()))])
        cost = self.check_cost(1 + self.tokens_scored(count)) + np.where(count > 0, self.draft_cost(count), 0.0)
        best = int(np.argmax(tokens / cost))
        if best == 0 and self.undecided(cost[1] / cost[0]):
            best = 1
        elif best > 0 and self.host and tokens[best] / cost[best] < CLEAR_GAIN / cost[0]:
            self.unchecked += 1
            if self.unchecked > (EARLY_CHECK if self.out[0] < 3 else LATER_CHECK):
                self.unchecked = 0
                return 0
        if best > 0:
            self.wait[0], self.pause = SHORTEST_WAIT, 0
            return best
        if self.pause > 0:
            self.pause -= 1
            return 0
        self.wait[0] = min(max(2 * self.wait[0], (cost[1] / cost[0] - 1) / TRIES), LONGEST_WAIT)
        self.pause = int(self.wait[0])
        return 1

    def undecided(self, cost: float) -> bool:
        """Whether a draft of one token, `cost` with its check, may pay yet: few rows have tried one, and it would pay if
        acceptance were a standard deviation above what was seen."""
        seen, tried = float(self.acceptance()[0]), float(self.tried[0] * self.rows[0])
        return tried < FEW_TRIES and 1 + seen + (seen * (1 - seen) / (tried + 2)) ** 0.5 > cost

    def acceptance(self) -> np.ndarray:
        """α_i of every position: its own rate, drawn to the rate of all."""
        common = (self.kept.sum() + PRIOR * PRIOR_DRAFTS) / (self.tried.sum() + PRIOR_DRAFTS)
        return (self.kept + DRAWN * common) / (self.tried + DRAWN)

    def tokens_scored(self, count: np.ndarray) -> np.ndarray:
        """Drafted tokens that the target scores for a draft of length `count`: as seen, else in proportion to what was
        seen of the nearest length."""
        seen = np.flatnonzero(self.scored)
        if not len(seen):
            return count.astype(float)
        nearest = seen[np.abs(seen[None, :] - count[:, None]).argmin(1)]
        return np.where(count > 0, self.scored[nearest] * count / nearest, 0.0)

    def check_cost(self, tokens: np.ndarray) -> np.ndarray:
        """Cost of a target call of `tokens` tokens and of verifying them."""
        return self.call_cost(tokens) + self.verified[0] / max(self.verified[1], 1e-9) * tokens

    def call_cost(self, tokens: np.ndarray) -> np.ndarray:
        """Cost of a target call of `tokens` tokens: straight lines through what was measured, and on from there; of more
        than one as far out as it was found to be."""
        found = np.exp(self.out[1] / (self.out[0] + 2))
        return self.measured(tokens) * np.where(tokens > 1, found, 1.0)

    def measured(self, tokens: np.ndarray) -> np.ndarray:
        assert self.costs is not None
        sizes = sorted(self.costs)
        seconds = [self.costs[n] for n in sizes]
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return np.interp(tokens, sizes, seconds) + slope * np.maximum(tokens - sizes[-1], 0)

    def compare(self, drafted: bool, tokens: float, seconds: float) -> None:
        """Note what a target call of so many tokens took; next to rounds of the other kind it tells how far costs are out."""
        own = float(np.log(max(seconds, 1e-9) / self.measured(np.array([tokens]))[0]))
        if drafted != self.drafted and (other := self.recent.get(not drafted)) is not None:
            self.out *= 0.9
            self.out += 1, own - other if drafted else other - own
        self.recent[drafted] = own if drafted not in self.recent else 0.7 * self.recent[drafted] + 0.3 * own
        self.drafted = drafted

    def nominal_draft(self) -> float:
        """What one of the drafter's calls is taken to cost."""
        return NOMINAL_DRAFT + self.context.stats.draft_ratio

    def draft_cost(self, count: np.ndarray) -> np.ndarray:
        """Cost of drafting `count` tokens, in target calls of one token: a line through the rounds seen so far."""
        weight, n, nn, cost, n_cost, own = self.draft
        if weight == 0:
            return self.nominal_draft() * count if self.nominal else np.zeros(len(count))
        # a little of the slope that the drafter's calls tell keeps it where all drafts had one length
        square = n * n / weight
        slope = (n_cost - n * cost / weight + 0.1 * square * own / weight) / (nn - square + 0.1 * square)
        slope = min(max(slope, 0.0), cost / n)
        return np.maximum(cost / weight + slope * (count - n / weight), 0.0)

    def observe(self, proposed: int, gained: Sequence[int], stats: DecodingStats) -> None:
        accepted = np.array([g - 1 for g in gained if g])
        reach = min(proposed, self.length)
        if self.costs is None or not len(accepted):
            return
        self.rows[0] = len(accepted)
        drafting, scoring, verifying, scored, rows, drafted = (
            new - old for new, old in zip(counts(stats), self.before, strict=True)
        )
        scored = scored / rows if rows else float(reach)
        second = float(self.call_cost(np.array([1.0 + scored]))[0]) / max(scoring, 1e-9)  # in target calls of one token
        if self.host:
            self.compare(reach > 0, 1.0 + scored, scoring)
            self.verified *= self.decay
            self.verified += verifying * second, 1 + scored
        if not reach:
            return
        self.scored[reach] = scored
        cost = self.nominal_draft() * drafted if self.nominal else drafting * second
        if self.sum:
            self.promised *= self.decay
            self.promised += accepted.mean(), self.sum
        self.draft *= self.decay
        # every call costs the same, and the first token takes one: none of a block's costs more than the first
        slope = cost / drafted * (drafted - 1) / (reach - 1) if drafted and reach > 1 else cost / reach
        self.draft += [1.0, reach, reach**2, cost, reach * cost, slope]
        position = np.arange(reach)[:, None]
        self.kept *= self.decay
        self.tried *= self.decay
        self.tried[:reach] += (accepted >= position).mean(1)
        self.kept[:reach] += (accepted > position).mean(1)
