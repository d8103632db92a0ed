"""Speculative sampling.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192;
Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv 2302.01318.

    accept x_i with probability min(1, p_i(x_i) / q_i(x_i));
    at the first rejection draw from norm([p_i - q_i]+) and stop; if all N pass, draw from p_{N+1}.

Guarantee: exact. Acceptance rate at a position: Σ_v min(p, q) = 1 - TV(p, q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, leading, next_from_residual, uniform


@rule(guarantee="exact", paper="2211.17192", greedy=greedy_match)
def speculative_sampling(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify one drafted chain.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]. N = 0 draws a token from the target.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    p = at_tokens(target_probs[:, :length], draft_tokens)
    q = torch.ones_like(p) if draft_probs is None else at_tokens(draft_probs, draft_tokens)
    accepted = leading(uniform(draft_tokens, generator) * q < p)
    return Verdict(accepted, next_from_residual(accepted, draft_tokens, draft_probs, target_probs, generator))
