"""Sampled tolerance.

Li et al., "Fast and High-Quality Auto-Regressive Speech Synthesis via Speculative Decoding" (VADUSA),
arXiv 2410.21951.

    draw τ tokens from p; accept x if it is among them, otherwise emit the first of them.

The τ draws are not made: x is among them with probability 1 - (1 - p(x))^τ, and given that it is not, the first draw
has the distribution norm(p without x).
Guarantee: heuristic; τ = 1 is exact (plain sampling, matched).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, leading, next_from_residual, uniform


@rule(guarantee="heuristic", paper="2410.21951", greedy=greedy_match)
def sampled_tolerance(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    tolerance: int = 3,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Keep a drafted token if `tolerance` draws from the target would contain it.

    draft_tokens [B, N] long; draft_probs is not used; target_probs [B, N+1, V]; tolerance >= 1.
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("tolerance", tolerance, 1)
    p = at_tokens(target_probs[:, :length], draft_tokens)
    found = -torch.expm1(tolerance * torch.log1p(-p.clamp(max=1)))  # 1 - (1 - p)^τ, precise for small p
    accepted = leading(uniform(draft_tokens, generator) < found)
    return Verdict(accepted, next_from_residual(accepted, draft_tokens, None, target_probs, generator))
