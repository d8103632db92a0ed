"""The state of a constrained beam search for lists: beams in a trie, how they are ranked, and rows that finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.trie import Trie
from polyspec.verification import gumbel_noise


@dataclass(frozen=True, slots=True)
class Beams:
    """W beams a row, best first. node `[B, W]` long: where in the trie, 0 if there is none; score `[B, W]` float32:
    cumulative log-probability, -inf if there is none; key `[B, W]` float32: what they are ranked by."""

    node: Tensor
    score: Tensor
    key: Tensor

    def take(self, index: Tensor) -> Beams:
        """The beams at `index [B, W']`; none where it is -1."""
        none, at = index < 0, index.clamp(min=0)
        score, key = (x.gather(1, at).masked_fill(none, -torch.inf) for x in (self.score, self.key))
        return Beams(self.node.gather(1, at).masked_fill(none, 0), score, key)


class Ranking(Protocol):
    """How beams are ranked: what a child's score and key are, given its parent and its log-probability. Derive from it:
    `keep` has a default."""

    def keep(self, rows: Tensor) -> Ranking:
        """The ranking of only the given rows."""
        return self

    def __call__(self, parents: Beams, tokens: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and keys `[B, W, C]` of children `tokens [B, W, C]`; log_p `[B, W, C]`: over the whole vocabulary, -inf
        where there is no child."""
        ...


class ByProbability(Ranking):
    """Beam search: by cumulative log-probability over the whole vocabulary, as transformers scores beams."""

    def __call__(self, parents: Beams, tokens: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        score = parents.score.unsqueeze(-1) + log_p
        return score, score


class ByGumbel(Ranking):
    """Stochastic Beams and Where to Find Them, 1903.06059, Algorithm 1: a draw of K sequences without replacement.

    φ is the log-probability of a prefix with each step renormalised over what the trie allows; G_φ = φ + Gumbel noise, and
    with Z the maximum over the children of a node whose own key is G, a child's key is

        G̃ = -log(exp(-G) - exp(-Z) + exp(-G_φ)),

    so that the best child of every node inherits its key and the final keys are perturbed log-probabilities of whole
    sequences. Noise is fixed by (row seed, node, token), so it is the same however rounds are cut, and a drafter can use it.
    """

    def __init__(self, seeds: Tensor):
        self.seeds = seeds

    def keep(self, rows: Tensor) -> Ranking:
        return type(self)(self.seeds[rows])

    def __call__(self, parents: Beams, tokens: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        exists = log_p != -torch.inf  # NaN stays, to be found
        allowed = (log_p - log_p.logsumexp(-1, keepdim=True)).masked_fill(~exists, -torch.inf)
        score = parents.score.unsqueeze(-1) + allowed
        noise = gumbel_noise(self.seeds, parents.node, int(log_p.shape[-1]))  # children of a node in trie order
        perturbed = score + noise
        above = parents.key.unsqueeze(-1)
        v = above - perturbed + torch.log1p(-(perturbed - perturbed.amax(-1, keepdim=True)).exp())
        key = above - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
        return score, key.masked_fill(score == -torch.inf, -torch.inf)


@dataclass(slots=True)
class Search:
    """B rows being searched.

    prompts `[B, P]` long, each row's tokens first and its last one in the last column (`pack`); lengths: tokens in each;
    widths: beams K of each row; alive: which trie nodes a row may use `[B, n]` bool, None for all. Rows that have finished
    leave the batch; `found` are the beams of all.
    """

    trie: Trie
    prompts: Tensor
    lengths: list[int]
    widths: list[int]
    ranking: Ranking = field(default_factory=ByProbability)
    alive: Tensor | None = None
    generator: torch.Generator | None = None
    beams: Beams = field(init=False)
    levels: list[int] = field(init=False)
    """How many tokens of each row's beams are settled."""
    found: Beams = field(init=False)
    """The beams of the rows that are finished, `[B, K]`, in the order of the prompts."""
    rows: Tensor = field(init=False)
    """Which of the prompts the rows are that are left."""

    def __post_init__(self) -> None:
        rows, device = len(self.lengths), self.prompts.device
        start = torch.zeros(rows, 1, device=device)
        self.beams = Beams(torch.zeros(rows, 1, dtype=torch.long, device=device), start, start)
        self.levels = [0] * rows
        nothing = start.new_full((rows, self.most), -torch.inf)
        self.found = Beams(torch.zeros_like(nothing, dtype=torch.long), nothing, nothing.clone())
        self.rows = torch.arange(rows, device=device)

    @property
    def finished(self) -> bool:
        return all(level == self.trie.depth for level in self.levels)

    @property
    def running(self) -> list[int]:
        """The rows that are not finished."""
        return [row for row, level in enumerate(self.levels) if level < self.trie.depth]

    def settle(self) -> None:
        """Enter the beams as found, best first (a rule that samples returns them in another order)."""
        beams = self.beams.take(self.beams.key.argsort(dim=1, descending=True, stable=True))
        width = beams.node.shape[1]
        self.found.node[self.rows, :width] = beams.node
        self.found.score[self.rows, :width] = beams.score
        self.found.key[self.rows, :width] = beams.key

    def keep(self, rows: list[int]) -> Tensor:
        """Go on with these rows only, and no more beams than they have; returns their indices as a tensor."""
        self.settle()
        index = torch.tensor(rows, device=self.prompts.device)
        self.lengths, self.widths, self.levels = (
            [x[r] for r in rows] for x in (self.lengths, self.widths, self.levels)
        )
        self.prompts, self.rows, self.ranking = self.prompts[index], self.rows[index], self.ranking.keep(index)
        self.alive = None if self.alive is None else self.alive[index]
        self.beams = Beams(*(x[index, : self.most] for x in (self.beams.node, self.beams.score, self.beams.key)))
        return index

    @property
    def remaining(self) -> int:
        """The most levels any row still lacks."""
        return self.trie.depth - min(self.levels)

    @property
    def most(self) -> int:
        """The most beams of any row."""
        return max(self.widths)

    def branching(self, ahead: int) -> int:
        """The most children of any running row's beams `ahead` levels on."""
        widths = self.trie.widths
        return max((widths[n + ahead] for n in self.levels if n + ahead < len(widths)), default=1)

    def expand(self, beams: Beams, logits: Tensor, branching: int) -> Beams:
        """All that may follow `beams`, as `W · branching` candidates a row, from the logits `[B, W, V]` behind them."""
        child, exists = self.trie.children(beams.node, branching, self.alive)
        tokens = self.trie.token[child]
        exists &= (beams.score > -torch.inf).unsqueeze(-1)
        logits = logits.float()
        log_p = logits.gather(2, tokens) - logits.logsumexp(-1, keepdim=True)
        score, key = self.ranking(beams, tokens, log_p.masked_fill(~exists, -torch.inf))
        return Beams(torch.where(exists, child, 0).flatten(1), score.flatten(1), key.flatten(1))


def pack(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, list[int]]:
    """Prompts as a `Search` takes them: `[B, P]` with each row's last token in the last column and the others from the
    first, and their lengths. InputError if one is empty."""
    lengths = [len(p) for p in prompts]
    if not prompts or min(lengths) == 0:
        raise InputError("a prompt is empty; give every row at least one token")
    width = max(lengths)
    rows = [[*p[:-1], *[0] * (width - len(p)), p[-1]] for p in prompts]
    return torch.tensor(rows, device=device), lengths
