"""Multi-token prediction: keep what the heads are sure of, or check it.

Raj et al., "Faster Speech-LLaMA Inference with Multi-token Prediction", arXiv 2409.08148.

    threshold mode:     keep head k's token while its own probability q_k(x) > threshold; nothing is checked;
    verification mode:  the next call's own head checks the tokens: here speculative sampling.

In both the target's token follows what is kept.
Guarantee: heuristic; without a threshold it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, leading, sample
from polyspec.verification.speculative_sampling import speculative_sampling


@rule(guarantee="heuristic", paper="2409.08148")
def multi_token_greedy(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Verdict:
    """`multi_token` with an argmax behind what is kept; arguments as there."""
    if threshold is None:
        return greedy_match(draft_tokens, draft_probs, target_probs, generator=generator)
    accepted = _sure(draft_tokens, draft_probs, target_probs, threshold, generator)
    return Verdict(accepted, at_position(target_probs, accepted).argmax(-1))


@rule(guarantee="heuristic", paper="2409.08148", greedy=multi_token_greedy)
def multi_token(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Keep drafted tokens by the heads' own confidence; None: by speculative sampling.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V], which a threshold cannot do without; target_probs
    [B, N+1, V]; threshold in [0, 1]. Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for the
    threshold.
    """
    if threshold is None:
        return speculative_sampling(draft_tokens, draft_probs, target_probs, generator=generator)
    accepted = _sure(draft_tokens, draft_probs, target_probs, threshold, generator)
    return Verdict(accepted, sample(at_position(target_probs, accepted), generator))


def _sure(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    threshold: float,
    generator: torch.Generator | None,
) -> Tensor:
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("threshold", threshold, 0, 1)
    if length == 0:
        return draft_tokens.new_zeros(len(draft_tokens))
    if draft_probs is None:
        raise InputError(
            "a threshold on the heads' confidence needs draft_probs; set threshold=None to check drafts instead"
        )
    return leading(at_tokens(draft_probs, draft_tokens) > threshold)
