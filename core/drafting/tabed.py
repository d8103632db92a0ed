"""Ensemble drafting whose weights follow what the target has chosen so far.

TABED: Test-Time Adaptive Ensemble Drafting for Robust Speculative Decoding in LVLMs, 2601.20357. P_ens as in `ibed`, where
after every round the weights become, for each row,

    w = argmax over the simplex in steps of 0.1 of  Σ_past [argmax_x Σ_m w_m q_m(x) = y]

with y what the target put at each past position that the drafter had the right context for: its argmax in greedy
decoding, its draw in sampling. Among equals, the w nearest to the mean wins. q depends on committed tokens alone: exact.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from polyspec.drafting.base import Context, Draft
from polyspec.drafting.ibed import Ibed

STEPS = 10  # of the grid, from 0 to 1
CANDIDATES = 32  # most likely tokens of each draft among which an argmax of their mixtures is sought


@cache
def grid(count: int) -> Tensor:
    """All weights of `count` drafts `[G, count]` in tenths that sum to 1, those nearest to equal ones first."""
    points = [p for p in product(range(STEPS + 1), repeat=count) if sum(p) == STEPS]
    return torch.tensor(sorted(points, key=lambda p: sum(x * x for x in p))) / STEPS


class Tabed(Ibed):
    """`Ibed` with weights a row that maximise past agreement; same arguments."""

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.grid = grid(self.copies).to(context.sequences.device)
        self.agreed = torch.zeros(context.sequences.batch, len(self.grid), device=self.grid.device)
        self.drafted: list[tuple[Tensor, Tensor]] = []
        self.started = list(context.sequences.lengths)
        super().begin(context, hidden)

    def mix(self, logits: Tensor) -> Tensor:
        mixed = super().mix(logits)
        probs = logits.float().softmax(-1).unflatten(0, (self.copies, -1))[:, :, -1]
        likely = probs.topk(min(CANDIDATES, probs.shape[-1])).indices.transpose(0, 1).flatten(1)
        self.drafted.append((likely, probs.gather(2, likely.expand(self.copies, -1, -1))))
        return mixed

    def propose(self, count: int) -> Draft:
        self.adapt()
        self.started = list(self.context.sequences.lengths)
        return super().propose(count)

    def adapt(self) -> None:
        """Count which weights would have proposed what the target chose in the last round; take the best."""
        if not self.drafted:
            return
        s = self.context.sequences
        start = torch.tensor(self.started, device=s.device)
        tokens, probs = (torch.stack(parts, dim=-2) for parts in zip(*self.drafted, strict=True))  # [(K,) B, N, C]
        self.drafted = []
        column = torch.arange(tokens.shape[1], device=s.device)
        chosen = s.tokens.gather(1, (start[:, None] + column).clamp(max=s.limit))
        known = column < (s.length_tensor - start)[:, None]
        best = torch.einsum("gk,kbnc->bngc", self.grid, probs).argmax(-1)
        proposed = tokens.gather(2, best)
        self.agreed += ((proposed == chosen[..., None]) & known[..., None]).sum(1)
        self.weights = self.grid[self.agreed.argmax(1)] if bool(self.agreed.any()) else self.weights
