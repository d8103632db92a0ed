"""Greedy verification: keep the draft while it is what the target would have chosen.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, at temperature 0.

    accept x_i while x_i = argmax_v p_i(v); then emit argmax_v p_{τ+1}(v).

Guarantee: exact; in float32 the output is token-identical to greedy decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import leading


@rule(guarantee="exact", paper="2211.17192")
def greedy_match(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Keep the longest prefix of argmaxes.

    draft_tokens [B, N] long; draft_probs is not used; target_probs [B, N+1, V]: any scores (logits do);
    generator is not used. Raises InputError for shapes, dtypes or devices that do not fit.
    """
    check_chain(draft_tokens, draft_probs, target_probs, generator)
    return match(draft_tokens, target_probs.argmax(-1))


def match(draft_tokens: Tensor, target_tokens: Tensor) -> Verdict:
    """draft_tokens [B, N] against the tokens the target chose at each position [B, N+1]."""
    accepted = leading(draft_tokens == target_tokens[:, :-1])
    return Verdict(accepted, target_tokens.gather(-1, accepted.unsqueeze(-1)).squeeze(-1))
