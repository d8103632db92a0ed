"""Additive tolerance.

Lin et al., "Accelerating Autoregressive Speech Synthesis Inference With Speech Speculative Decoding" (SSD),
arXiv 2505.15380.

    accept x with probability min(1, min(1, p(x) / q(x)) + β); at the first rejection draw from norm([p - q]+).

Guarantee: heuristic; β = 0 is exact (speculative sampling).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, leading, next_from_residual, uniform


@rule(guarantee="heuristic", paper="2505.15380", greedy=greedy_match)
def additive_tolerance(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    beta: float = 0.4,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Speculative sampling with a constant added to every acceptance probability.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]; beta in [0, 1].
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("beta", beta, 0, 1)
    p = at_tokens(target_probs[:, :length], draft_tokens)
    q = torch.ones_like(p) if draft_probs is None else at_tokens(draft_probs, draft_tokens)
    accepted = leading((uniform(draft_tokens, generator) - beta) * q < p)
    return Verdict(accepted, next_from_residual(accepted, draft_tokens, draft_probs, target_probs, generator))
