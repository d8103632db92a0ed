"""How many continuous tokens, and how many denoising steps of the target's own chain, to draft: as many as pay.

A round over N drafted tokens yields g(N) = 1 + Σ_{i≤N} α^i tokens and costs

    price(N) + 1 + (s(N) - 1)·ρ·ahead    head calls of the plain loop;

s(N) are the steps that the target's own chain has left, ρ the head calls it takes a step with a window (1 and ahead = 1
without), α the acceptance of a drafted token. Prices are measured (`Prices`); α, s and ρ are learnt as rounds go. Plain
decoding is one of the choices, and costs what it costs: nothing about it has to be learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyspec.errors import ConfigError
from polyspec.lengths import LengthPolicy, positive


@dataclass(frozen=True, slots=True)
class Prices:
    """What the parts of a round cost, in head calls of the plain loop: the target over one token; `first` drafts one token
    and judges it, each one more costs `more`; `ahead` is a head call over a window of denoising steps. `kept` is the share
    of drafted tokens that stood while this was measured: what is believed of them before a run has tried any."""

    alone: float
    first: float
    more: float
    ahead: float
    kept: float = 1.0

    def round(self, count: int) -> float:
        """Of a round that drafts `count` tokens, but for its chains."""
        return self.alone if count == 0 else self.first + (count - 1) * self.more


@dataclass(frozen=True, slots=True)
class Round:
    """What a round did: it drafted `count` tokens, kept with `chance [rows][count]`, then went on for `left [rows]` steps a
    chain in `calls` head calls over `window` steps each."""

    count: int
    window: int
    chance: Sequence[Sequence[float]]
    left: Sequence[int]
    calls: int


class LatentPolicy(Protocol):
    """Decides before every round of continuous tokens."""

    def begin_latents(self, steps: int, window: int, drafts: bool, prices: Callable[[], Prices]) -> None:
        """Start a run of `steps` denoising steps, at most `window` of them drafted ahead; whether tokens can be drafted."""
        ...

    def plan(self, most: int) -> tuple[int, int]:
        """Tokens, ≤ most, and denoising steps to draft in the coming round (0, 1: plain decoding)."""
        ...

    def observe_latents(self, found: Round) -> None:
        """The round's outcome."""
        ...


class Steady:
    """Always the whole window, and as many tokens as a policy for discrete tokens says, which learns nothing."""

    def __init__(self, length: LengthPolicy):
        self.length = length

    def begin_latents(self, steps: int, window: int, drafts: bool, prices: Callable[[], Prices]) -> None:
        self.window, self.drafts = window, drafts

    def plan(self, most: int) -> tuple[int, int]:
        return min(most, self.length.next()) if self.drafts else 0, self.window

    def observe_latents(self, found: Round) -> None:
        pass


def policy_of(length: Any) -> LatentPolicy:
    """The policy for continuous tokens that a recipe's `length` stands for."""
    return length if hasattr(length, "plan") else Steady(length)


MARGIN = 0.97  # drafting must cost less than this share of plain decoding: prices are not known better
SHARE = 0.01  # of the time may go into trying again what did not pay
SHORTEST_WAIT = 4.0  # rounds between two tries
DECAY = 0.8  # a round, of what was learnt


class Paying:
    """What costs least a token: up to `length` tokens, with or without the window of denoising steps.

    What might pay is tried at once, drafts with one token; what does not is tried so seldom that it costs 1 % of the time.
    prices: a mapping with the fields of `Prices` in place of measured ones, for the same choices on any machine.
    """

    def __init__(self, length: int, prices: Any = None):
        self.length = positive("length", length)
        self.prices = None if prices is None else given_prices(prices)

    def begin_latents(self, steps: int, window: int, drafts: bool, prices: Callable[[], Prices]) -> None:
        self.steps, self.window, self.counts = steps, min(window, steps), range(self.length + 1 if drafts else 1)
        self.cost = Prices(0, 0, 0, 1)
        if drafts or self.window > 1:
            self.cost = self.prices or prices()
        self.kept, self.tried = 0.0, 0.0  # of drafted tokens
        self.left, self.short, self.rows = 0.0, 0.0, 1  # share of the steps left where no row kept all its drafts
        self.calls, self.walked = 0.0, 0.0  # head calls with the window, and the steps they took
        self.pause: dict[str, float] = {}

    def round_cost(self, count: int, window: int) -> float:
        """Of a round, in head calls."""
        whole = 1 - (1 - self.acceptance**count) ** self.rows
        share = self.left / self.short if self.short else 0.5
        steps = self.steps * (whole + (1 - whole) * share)
        rate = self.calls / self.walked if self.walked else 1 / self.window
        chain = steps if window == 1 else 1 + max(0.0, steps - 1) * rate * self.cost.ahead
        return self.cost.round(count) + chain

    @property
    def acceptance(self) -> float:
        return self.kept / self.tried if self.tried else self.cost.kept

    def gain(self, count: int) -> float:
        """Tokens of a round that drafts `count`."""
        return sum(self.acceptance**i for i in range(count + 1))

    def plan(self, most: int) -> tuple[int, int]:
        counts = [n for n in self.counts if n <= most]
        options = [(n, w) for n in counts for w in sorted({1, self.window})]
        rates = {o: self.round_cost(*o) / self.gain(o[0]) for o in options}
        best = min(options, key=lambda o: (rates[o], o))
        if rates[best] > MARGIN * rates[0, 1]:
            best = (0, 1)
        if best[0] and not self.tried:
            return 1, best[1]
        unused = {"tokens": (1, best[1]) if best[0] == 0 else best, "steps": (best[0], self.window)}
        for kind, other in unused.items():
            if other == best or other not in rates:
                self.pause.pop(kind, None)
                continue
            lost = self.round_cost(*other) / rates[best] - self.gain(other[0])  # tokens
            wait = max(SHORTEST_WAIT, lost / SHARE)
            self.pause[kind] = min(self.pause.get(kind, wait), wait) - 1
            if self.pause[kind] < 0:
                self.pause[kind] = wait
                return other
        return best

    def observe_latents(self, found: Round) -> None:
        if found.count:
            self.rows = max(1, len(found.chance))
            self.kept, self.tried = self.kept * DECAY, self.tried * DECAY
            for chances in found.chance:
                reached = 1.0
                for chance in chances:
                    self.tried += reached / self.rows
                    reached *= chance
                    self.kept += reached / self.rows
        longest = max(found.left, default=0)
        if found.count and 0 < longest < self.steps:
            self.left, self.short = self.left * DECAY + longest / self.steps, self.short * DECAY + 1
        if found.window > 1 and longest > 1:
            self.calls, self.walked = self.calls * DECAY + found.calls - 1, self.walked * DECAY + longest - 1


def given_prices(prices: Any) -> Prices:
    """`Prices` of a mapping; ConfigError if it is not one of them."""
    try:
        found = Prices(**{str(k): float(v) for k, v in dict(prices).items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"prices must give alone, first, more and ahead, each a number, not {prices!r}") from error
    if min(found.alone, found.first, found.more, found.ahead) < 0:
        raise ConfigError(f"prices must be ≥ 0, got {found}")
    if not 0 <= found.kept <= 1:
        raise ConfigError(f"prices must give kept in [0, 1], got {found.kept}")
    return found
