"""Typical acceptance.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
arXiv 2401.10774.

    accept x while p(x) > min(ε, δ · exp(-H(p))); then draw from p.

Guarantee: heuristic. Medusa's "the first token is always kept" refers to the token its original head has already drawn,
which here is the last committed token; every drafted token is tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, leading, sample


@rule(guarantee="heuristic", paper="2401.10774", greedy=greedy_match)
def typical_acceptance(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    epsilon: float = 0.3,
    delta: float = 0.09,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Keep drafted tokens that are typical of the target.

    draft_tokens [B, N] long; draft_probs is not used; target_probs [B, N+1, V]; epsilon and delta in [0, 1].
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("epsilon", epsilon, 0, 1)
    check_knob("delta", delta, 0, 1)
    p = target_probs[:, :length]
    entropy = torch.special.entr(p).sum(-1, dtype=torch.float32)
    accepted = leading(at_tokens(p, draft_tokens) > (delta * (-entropy).exp()).clamp(max=epsilon))
    return Verdict(accepted, sample(at_position(target_probs, accepted), generator))
