"""Threshold rollback.

Kim et al., "Speculative Decoding with Big Little Decoder" (BiLD), arXiv 2302.07863, the rollback policy.

    keep x while -log p(x) < α_rollback; then take the target's token.

The other half of BiLD, drafting until max q < α_fallback, decides the draft length and belongs to the drafter.
Guarantee: heuristic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, leading, sample


@rule(guarantee="heuristic", paper="2302.07863")
def threshold_rollback_greedy(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    rollback: float = 2.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """`threshold_rollback` with an argmax at the end; target_probs are probabilities before any temperature."""
    accepted = _kept(draft_tokens, draft_probs, target_probs, rollback, generator)
    return Verdict(accepted, at_position(target_probs, accepted).argmax(-1))


@rule(guarantee="heuristic", paper="2302.07863", greedy=threshold_rollback_greedy)
def threshold_rollback(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    rollback: float = 2.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Keep drafted tokens the target finds likely enough; then draw from p.

    draft_tokens [B, N] long; draft_probs is not used; target_probs [B, N+1, V]; rollback >= 0 in nats.
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    accepted = _kept(draft_tokens, draft_probs, target_probs, rollback, generator)
    return Verdict(accepted, sample(at_position(target_probs, accepted), generator))


def _kept(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    rollback: float,
    generator: torch.Generator | None,
) -> Tensor:
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("rollback", rollback, 0)
    return leading(at_tokens(target_probs[:, :length], draft_tokens) > math.exp(-rollback))
