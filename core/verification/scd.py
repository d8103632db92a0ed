"""Speculative coupled decoding's window rules: SCD-MC (maximal coupling) and SCD-GS (Gumbel-sharing).

2510.24211 (ICML 2026). Speculative Jacobi decoding draws the unsettled part of its window afresh each round, so that
it changes even where the distributions hardly do. Coupling consecutive draws keeps it. Guarantee: exact for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.modified_rejection import modified_rejection
from polyspec.verification.rule import rule
from polyspec.verification.sampling import sample


@rule(guarantee="exact", paper="2510.24211")
def scd_mc(x: Tensor, q: Tensor, p: Tensor, *, generator=None, noise=None) -> tuple[Tensor, Tensor]:
    """Refine a window: modified rejection sampling of x `[B, W]` from q to p `[B, W+1, V]` at *every* position.

    Returns `y [B, W+1]`, `kept [B, W]`. Every y is distributed as p, so p is its draft distribution in the next round,
    also where x was kept (with the old q there the output is biased).
    """
    y, kept = modified_rejection(x, q, p[:, :-1], generator=generator)
    return torch.cat([y, sample(p[:, -1:], generator=generator)], dim=1), kept


@rule(guarantee="exact", paper="2510.24211")
def scd_gs(x: Tensor, q: Tensor, p: Tensor, *, generator=None, noise) -> tuple[Tensor, Tensor]:
    """Refine a window: verify x by modified rejection with fresh randomness up to the first rejection; what follows is
    argmax(log p + G) with Gumbel noise fixed per absolute position (`noise() -> [B, W+1, V]`), so that it changes
    only where p does. Returns `y [B, W+1]`, `kept [B, W]`.
    """
    y, kept = modified_rejection(x, q, p[:, :-1], generator=generator)
    shared = (p.log() + noise()).argmax(-1)
    front = kept.long().cumprod(1).bool()
    settled = torch.cat([torch.ones_like(front[:, :1]), front[:, :-1]], dim=1)
    shared[:, :-1] = y.where(settled, shared[:, :-1])
    return shared, kept
