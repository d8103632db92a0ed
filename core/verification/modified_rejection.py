"""Modified rejection sampling: turn a draw from q into a draw from p, keeping it where possible.

Leviathan et al., arXiv 2211.17192; as a coupling of consecutive drafts: "Speculative Coupled Decoding",
arXiv 2510.24211.

    keep x ~ q with probability min(1, p(x) / q(x)), else draw y ~ norm([p - q]+).

Guarantee: exact (y ~ p), and P(y = x) = 1 - TV(p, q), the most any coupling reaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_generator, check_ids, check_scores
from polyspec.verification.rule import rule
from polyspec.verification.sampling import at_tokens, sample, uniform


@rule(guarantee="exact", paper="2211.17192")
def modified_rejection(
    x: Tensor, q: Tensor, p: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """x [..] long drawn from q [.., V]; p [.., V] -> (y [..] long, kept [..] bool).

    Every position is treated on its own. Raises InputError for shapes, dtypes or devices that do not fit.
    """
    check_ids("x", x, x.dim())
    for name, probs in (("q", q), ("p", p)):
        check_scores(name, probs, x.dim() + 1, x.device)
        if probs.shape[:-1] != x.shape:
            raise InputError(f"{name} must be {list(x.shape)} + [V], not {list(probs.shape)}")
    if p.shape != q.shape:
        raise InputError(f"p and q must have one shape, not {list(p.shape)} and {list(q.shape)}")
    check_generator(generator, x.device)
    kept = uniform(x, generator) * at_tokens(q, x) < at_tokens(p, x)
    drawn = sample((p - q).clamp_(min=0), generator, fallback=p)
    return torch.where(kept, x, drawn), kept
