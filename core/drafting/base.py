"""The drafter's side of the seam: what it is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Draws, Processing
from polyspec.lengths import LengthPolicy
from polyspec.metrics import DecodingStats
from polyspec.target import Target

if TYPE_CHECKING:
    from polyspec.trees import Tree


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens `[B, N]` long; `probs [B, N, V]` each was drawn from, None if they are certain (one-hot q).

    With `tree`, the N tokens are its nodes 1…N (node 0 is the last committed token) and `probs[:, i]` is the
    distribution that the children of node i were drawn from, `[B, N+1, V]`.
    """

    tokens: Tensor
    probs: Tensor | None = None
    tree: Tree | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a run shares: the target (its embedding and output layer, guidance, vocabulary), the rows, how the target's
    tokens will be drawn (drafts drawn the same way are accepted more often), and the policy and counts of the run."""

    target: Target
    sequences: Sequences
    processing: Processing
    draws: Draws
    length: LengthPolicy
    stats: DecodingStats


class Drafter(Protocol):
    """A drafter is made once and begun for every run."""

    hidden_layers: tuple[int, ...]
    """Which of the target's hidden states (indices into transformers' `hidden_states`) `observe` needs."""

    def check(self, target: Target) -> None:
        """Raise a PolyspecError if this cannot draft for `target`. Asked before the target runs."""
        ...

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        """Start a run. hidden: the prompt's hidden states `[S, P-1, d]` per layer (row b: its first `cached[b]`
        positions), None if the prompt has one token."""
        ...

    def propose(self, count: int) -> Draft:
        """At most `count` ≥ 1 tokens a row (a tree: at most that depth) to follow each row's last committed token."""
        ...

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        """After a round: hidden states `[S, T, d]` of the last committed token and its drafts, along the accepted
        path; row b keeps the first `accepted[b] + 1` of them. Called after plain rounds too."""
        ...


class NoDraft:
    """Plain decoding: nothing is drafted."""

    hidden_layers: tuple[int, ...] = ()

    def check(self, target: Target) -> None:
        pass

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.sequences = context.sequences

    def propose(self, count: int) -> Draft:
        return Draft(self.sequences.tail(1)[:, :0])

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        pass
