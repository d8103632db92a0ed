"""How many tokens to draft. Every policy answers `next()` before a round and sees the outcome in `observe`."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from polyspec.costs import call_costs
from polyspec.errors import ConfigError
from polyspec.metrics import DecodingStats

if TYPE_CHECKING:
    from polyspec.drafting.base import Context
    from polyspec.target import Target


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


NOMINAL_TOKEN = 0.015  # what one more token adds to a target call, in calls of one token
# the same on a CPU, of a large model; of one with so many parameters half, as half of its time goes into other things
CPU_TOKEN, CPU_SIZE = 0.05, 10_000_000
NOMINAL_DRAFT = 0.03  # what a drafter's call costs beside its share of parameters
PRIOR, PRIOR_DRAFTS = 0.7, 3  # the acceptance rate that so many drafts are taken to have had before any was seen
SHORTEST_WAIT, LONGEST_WAIT = 4.0, 256.0  # rounds without a draft between two tries, while drafting does not pay
DRAWN = 6  # drafts' worth of the rate of all positions in that of each: a few failures there are not held for good
OUTLIER = 3.0  # times what a draft was expected to cost are held to be an accident
SAME_FOR_ALL = 8  # tokens' worth of the cost of verifying is there however few they are, until lengths tell
FEW_TRIES = 16  # drafts, discounted, of all rows; before that drafting is not given up for a streak of bad luck
TRIES = 0.02  # of the time may go into them
CLEAR_GAIN = 1.5  # where drafting seems to gain less, a plain round now and then shows whether costs are as measured
EARLY_CHECK, LATER_CHECK = 8, 64  # rounds between two of these, of the first three and later


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


class Line:
    """A straight line through costs seen of n tokens, old ones discounted.

    hold: how firmly it keeps to the slopes that costs suggest by themselves, against what differing n tell."""

    def __init__(self, hold: float) -> None:
        self.hold = hold
        self.sums = [0.0] * 6  # of 1, n, n², cost, n·cost, and the slope that a cost suggests by itself

    def add(self, decay: float, n: float, cost: float, slope: float) -> None:
        add(self.sums, decay, (1.0, n, n * n, cost, n * cost, slope))

    def at(self, n: float) -> float:
        """The cost of `n` tokens, 0 where nothing was seen."""
        weight, seen, squares, cost, products, own = self.sums
        if not weight:
            return 0.0
        square = seen * seen / weight
        held = self.hold * square
        slope = (products - seen * cost / weight + held * own / weight) / (squares - square + held)
        slope = min(max(slope, 0.0), cost / seen)
        return max(cost / weight + slope * (n - seen / weight), 0.0)


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
    are nominal (`nominal_token`; for each of the drafter's calls, which are counted as it runs, one a token, one a block, or
    none, its share of parameters and `NOMINAL_DRAFT`) and nothing is carried over from earlier runs.
    """

    def __init__(self, length: int = 16, decay: float = 0.98):
        super().__init__(length)
        if not 0 < decay <= 1:
            raise ConfigError(f"decay must lie in (0, 1], got {decay!r}")
        self.decay = decay
        # lists, as numbers so few are handled faster one by one than as arrays; changed in place, for a run's copy shares them
        self.kept, self.tried = [0.0] * self.length, [0.0] * self.length
        self.draft, self.verified = Line(0.1), Line(0.002)  # cost of drafting n tokens, and of verifying n
        self.scored = [0.0] * (self.length + 1)  # tokens scored for a draft of length n when last seen, 0: never yet
        self.promised = [1.0, 1.0]  # discounted sums over trees: tokens accepted, Σ V of their nodes
        self.wait = [SHORTEST_WAIT]  # rounds between two tries while zero wins
        self.rows = [1]  # that drafted last
        self.out = [0.0, 0.0]  # discounted: turns from plain rounds to drafts or back, log of how far costs were out

    def begin(self, context: Context) -> None:
        self.context = context
        self.nominal = context.draws.fixed_rounds
        self.costs: list[tuple[int, float]] | None = None
        if self.nominal:
            fresh = Auto(self.length, self.decay)
            self.__dict__.update({name: value for name, value in vars(fresh).items() if isinstance(value, list | Line)})
        else:  # what earlier runs taught is a start, worth ten rounds
            trust = min(1.0, 10 / max(self.draft.sums[0], 1e-9))
            for learnt in (self.kept, self.tried, self.draft.sums, self.verified.sums):
                fade(learnt, trust)
        # elsewhere the target's own time is spent where the host waits for it, that is while verifying
        self.host = context.target.device.type == "cpu" and not self.nominal
        # log of the seconds by cost of the latest target calls, of rounds with a draft or not
        self.recent: dict[bool, float] = {}
        self.drafted, self.trying, self.unchecked = False, False, 0
        self.before = (0.0, 0.0, 0.0, 0, 0, 0)
        self.count, self.sum = 0, 0.0  # of the round under way: the draft's length, Σ V of the nodes checked
        self.pause = int(self.wait[0]) if any(self.tried) else 0

    def next(self) -> int:
        self.before, self.sum = counts(self.context.stats), 0.0
        self.count = self.choose()
        return self.count

    def budget(self, values: Tensor) -> int:
        running = self.context.sequences.running_tensor[: len(values), None]
        sums = (torch.where(running, values.exp(), 0).cumsum(1).sum(0) / running.sum()).tolist()
        drafting, worth = self.draft_cost(self.count), self.promised[0] / self.promised[1]
        rates = [(1 + worth * v) / (self.check_cost(2 + i) + drafting) for i, v in enumerate(sums)]
        best = max(range(len(rates)), key=rates.__getitem__)
        self.sum = sums[best]
        return best + 1

    def choose(self) -> int:
        if self.costs is None:
            self.costs = self.find_costs()
        plain, one = self.check_cost(1), 0.0
        best, rate, tokens, path = 0, 1 / plain, 1.0, 1.0
        self.trying = False
        for n in range(1, self.length + 1):
            path *= self.acceptance(n)
            tokens += path
            cost = self.check_cost(1 + self.tokens_scored(n)) + self.draft_cost(n)
            one = one or cost
            if tokens / cost > rate:
                best, rate = n, tokens / cost
            if tokens + path * (self.length - n) < rate * cost:  # none of the longer ones can do better
                break
        if best == 0 and self.undecided(one / plain):
            best = 1
        elif best > 0 and self.host and rate < CLEAR_GAIN / plain:
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
        self.wait[0] = min(max(2 * self.wait[0], (one / plain - 1) / TRIES), LONGEST_WAIT)
        self.pause, self.trying = int(self.wait[0]), True
        return 1

    def find_costs(self) -> list[tuple[int, float]]:
        """Costs of target calls by number of tokens."""
        if self.nominal:
            return [(1, 1.0), (1001, 1 + 1000 * nominal_token(self.context.target))]
        return sorted(call_costs(self.context, self.length + 1).items())

    def undecided(self, cost: float) -> bool:
        """Whether a draft of one token, `cost` with its check, may pay yet: few rows have tried one, and it would pay if
        acceptance were a standard deviation above what was seen."""
        seen, tried = self.acceptance(1), self.tried[0] * self.rows[0]
        return tried < FEW_TRIES and 1 + seen + (seen * (1 - seen) / (tried + 2)) ** 0.5 > cost

    def acceptance(self, n: int) -> float:
        """α_n of the n-th position: its own rate, drawn to the rate of all."""
        common = (sum(self.kept) + PRIOR * PRIOR_DRAFTS) / (sum(self.tried) + PRIOR_DRAFTS)
        return (self.kept[n - 1] + DRAWN * common) / (self.tried[n - 1] + DRAWN)

    def tokens_scored(self, count: int) -> float:
        """Drafted tokens that the target scores for a draft of length `count`: as seen, else in proportion to what was
        seen of the nearest length."""
        for away in range(self.length + 1):
            for n in (count - away, count + away):
                if 0 < n <= self.length and self.scored[n]:
                    return self.scored[n] * count / n
        return float(count)

    def check_cost(self, tokens: float) -> float:
        """Cost of a target call of `tokens` tokens and of verifying them."""
        return self.call_cost(tokens) + self.verified.at(tokens)

    def call_cost(self, tokens: float) -> float:
        """Cost of a target call of `tokens` tokens: as measured, and of more than one as far out as it was found to be."""
        return self.measured(tokens) * (math.exp(self.out[1] / (self.out[0] + 2)) if tokens > 1 else 1.0)

    def measured(self, tokens: float) -> float:
        """The same as it was measured: straight lines through what was, and on from there."""
        assert self.costs is not None
        above = min(bisect_left(self.costs, (tokens, 0.0)) or 1, len(self.costs) - 1)
        (low, less), (high, more) = self.costs[above - 1], self.costs[above]
        return less + (more - less) * (tokens - low) / (high - low)

    def compare(self, drafted: bool, tokens: float, seconds: float) -> None:
        """Note what a target call of so many tokens took; next to rounds of the other kind it tells how far costs are out."""
        own = math.log(max(seconds, 1e-9) / self.measured(tokens))
        if drafted != self.drafted and (other := self.recent.get(not drafted)) is not None:
            add(self.out, 0.9, (1, own - other if drafted else other - own))
        self.recent[drafted] = own if drafted not in self.recent else 0.7 * self.recent[drafted] + 0.3 * own
        self.drafted = drafted

    def nominal_draft(self) -> float:
        """What one of the drafter's calls is taken to cost."""
        return NOMINAL_DRAFT + self.context.stats.draft_ratio

    def time_draft(self, count: int, calls: float, cost: float) -> None:
        """Note what a draft of `count` tokens in so many of the drafter's calls cost, but for what it was made ready with the
        first time, or what else the machine did meanwhile."""
        expected = self.draft_cost(count) if self.draft.sums[0] else self.nominal_draft() * calls
        cost = min(cost, OUTLIER * max(expected, NOMINAL_DRAFT))
        # every call costs the same, and the first token takes one: none of a block's costs more than the first
        slope = cost / calls * (calls - 1) / (count - 1) if calls and count > 1 else cost / count
        # a try asks whether what was believed still holds
        self.draft.add(0.5 if self.trying else self.decay, count, cost, slope)

    def draft_cost(self, count: int) -> float:
        """Cost of drafting `count` tokens, in target calls of one token."""
        if self.nominal and not self.draft.sums[0]:
            return self.nominal_draft() * count
        return self.draft.at(count)

    def observe(self, proposed: int, gained: Sequence[int], stats: DecodingStats) -> None:
        accepted = [g - 1 for g in gained if g]
        reach = min(proposed, self.length)
        if self.costs is None or not accepted:
            return
        self.rows[0] = len(accepted)
        drafting, scoring, verifying, scored, rows, drafted = (
            new - old for new, old in zip(counts(stats), self.before, strict=True)
        )
        scored = scored / rows if rows else float(reach)
        second = self.call_cost(1 + scored) / max(scoring, 1e-9)  # in target calls of one token
        if self.host:
            self.compare(reach > 0, 1 + scored, scoring)
            cost = verifying * second
            self.verified.add(self.decay, 1 + scored, cost, cost / (1 + scored + SAME_FOR_ALL))
        if not reach:
            return
        self.scored[reach] = scored
        if self.sum:
            add(self.promised, self.decay, (sum(accepted) / len(accepted), self.sum))
        self.time_draft(reach, drafted, self.nominal_draft() * drafted if self.nominal else drafting * second)
        fade(self.kept, self.decay)
        fade(self.tried, self.decay)
        for position in range(reach):
            there = sum(a >= position for a in accepted)
            self.tried[position] += there / len(accepted)
            self.kept[position] += sum(a > position for a in accepted) / len(accepted)
            if not there:
                break


def nominal_token(target: Target) -> float:
    """What one more token in every row is taken to add to a call of one token a row, in such calls: its arithmetic beside
    reading the weights, which all rows share."""
    token = NOMINAL_TOKEN
    if target.device.type == "cpu":
        size = target.model.num_parameters()
        token = CPU_TOKEN * size / (size + CPU_SIZE)
    rows = len(target.cache_lengths)
    return token * rows / (1 + token * (rows - 1))


def fade(sums: list[float], by: float) -> None:
    """Discount `sums` in place."""
    sums[:] = [by * x for x in sums]


def add(sums: list[float], decay: float, values: Sequence[float]) -> None:
    """Discount `sums` in place, and add `values`."""
    sums[:] = [decay * x + new for x, new in zip(sums, values, strict=True)]
