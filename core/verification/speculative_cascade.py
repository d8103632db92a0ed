"""Speculative cascades.

Narasimhan et al., "Faster Cascades via Speculative Decoding", arXiv 2405.19261, the OPT deferral rule.

    d = 1 (defer to the target) if max q < max p - α · TV(p, q), else 0;
    π = (1 - d) · q + d · p;  speculative sampling of π: accept x with min(1, π(x) / q(x)), else norm([π - q]+).

Guarantee: exact for π, hence heuristic with respect to p. After a full acceptance no q exists: drawn from p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, leading, next_from_residual, uniform


@rule(guarantee="heuristic", paper="2405.19261", greedy=greedy_match)
def speculative_cascade(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    alpha: float = 0.5,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify a chain against the cascade of drafter and target.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (needed: a deterministic draft would never defer);
    target_probs [B, N+1, V]; alpha >= 0, the cost of deferring.
    Raises InputError for shapes, dtypes or devices that do not fit or missing draft_probs, ConfigError for alpha.
    """
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("alpha", alpha, 0)
    if draft_probs is None:
        raise InputError("speculative_cascade needs draft_probs: with a one-hot q it would accept everything")
    p = target_probs[:, :length]
    distance = (p - draft_probs).abs_().sum(-1, dtype=torch.float32) / 2
    defer = draft_probs.amax(-1).float() < p.amax(-1).float() - alpha * distance
    passed = uniform(draft_tokens, generator) * at_tokens(draft_probs, draft_tokens) < at_tokens(p, draft_tokens)
    accepted = leading(~defer | passed)  # a rejection happens only where π = p, so the residual is the usual one
    return Verdict(accepted, next_from_residual(accepted, draft_tokens, draft_probs, target_probs, generator))
