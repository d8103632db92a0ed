"""Speculative Jacobi decoding's window rule.

Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding, 2410.01699
(ICLR 2025), Algorithm 1. Guarantee: exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.modified_rejection import modified_rejection
from polyspec.verification.rule import rule
from polyspec.verification.sampling import sample


@rule(guarantee="exact", paper="2410.01699")
def sjd(x: Tensor, q: Tensor, p: Tensor, *, generator=None, noise=None) -> tuple[Tensor, Tensor]:
    """Refine a window: x `[B, W]` drawn from q `[B, W, V]` against p `[B, W+1, V]`.

    Left to right x is kept with min(1, p(x)/q(x)); the first rejected position gets a draw from norm([p−q]+); what
    follows it is drawn afresh from p. Returns `y [B, W+1]` and `kept [B, W]`; y counts up to the first False.
    """
    y, kept = modified_rejection(x, q, p[:, :-1], generator=generator)
    return redraw_behind(y, kept, p, generator), kept


def redraw_behind(y: Tensor, kept: Tensor, p: Tensor, generator: torch.Generator | None) -> Tensor:
    """y `[B, W]` up to and including its first token that was not kept, and fresh draws from p behind: `[B, W+1]`."""
    fresh = sample(p, generator=generator)
    front = kept.long().cumprod(1)  # 1 before the first rejection
    settled = front.bool()
    settled[:, 1:] |= front[:, :-1].bool()
    settled[:, :1] = True
    fresh[:, :-1] = y.where(settled, fresh[:, :-1])
    return fresh
