"""Recursive rejection sampling over several candidates for one token.

With replacement: Miao et al., "SpecInfer", arXiv 2305.09781. Without: Jeon et al., "Recursive Speculative Decoding"
(RSD), arXiv 2402.14160; Chen et al., "Sequoia", arXiv 2402.12374.

    r_1 = p, q_1 = q;  accept child j with probability min(1, r_j(x_j) / q_j(x_j)), else r_{j+1} = norm([r_j - q_j]+);
    with replacement q_{j+1} = q;  without, q_{j+1} = q_j without x_j, renormalised;
    if every child is rejected draw from the last r.

Guarantee: exact, for children drawn from q in the way stated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_generator, check_ids, check_scores
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, sample, uniform


@rule(guarantee="exact", paper="2402.12374")
def recursive_rejection(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    *,
    replacement: bool,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify K candidates for one position.

    target_probs [B, V]; draft_tokens [B, K] long in the order they were drawn, -1 where there is none; draft_probs
    [B, V], the distribution they were drawn from (None: deterministic candidates, accepted if the target draws them).
    Verdict: accepted = 1 + the index of the accepted candidate (0: none), next_token = the emitted token.
    A candidate with q_j(x_j) = 0, which no draw produces, is passed over.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    check_step(target_probs, draft_tokens, draft_probs, generator)
    if draft_probs is None:
        return match_candidates(sample(target_probs.float(), generator), draft_tokens)
    u = uniform(draft_tokens, generator)
    residual, q = target_probs.float(), draft_probs.float()  # both unnormalised; their sums are carried along
    total, q_total = residual.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    accepted = draft_tokens.new_zeros(draft_tokens.shape[0])
    for j, x in enumerate(draft_tokens.clamp(min=0).unbind(1)):
        q_x = at_tokens(q, x)
        tried = (accepted == 0) & (draft_tokens[:, j] >= 0) & (q_x > 0)
        passed = u[:, j] * q_x * total[:, 0] < at_tokens(residual, x) * q_total[:, 0]
        accepted = torch.where(tried & passed, j + 1, accepted)

        left = (residual - q * (total / q_total)).clamp_(min=0)
        left_total = left.sum(-1, keepdim=True)
        update = (tried & ~passed).unsqueeze(-1) & (left_total > 0)  # all zero: r = q up to rounding, keep r
        residual = torch.where(update, left, residual)
        total = torch.where(update, left_total, total)
        if not replacement:
            spent = torch.where(tried, 0, q_x).to(q.dtype).unsqueeze(-1)
            q = q.scatter(-1, x.unsqueeze(-1), spent)
            q_total = q.sum(-1, keepdim=True)
    return choose(accepted, draft_tokens, sample(residual, generator))


def choose(accepted: Tensor, draft_tokens: Tensor, drawn: Tensor) -> Verdict:
    """The accepted candidate (1-based; 0: none) of draft_tokens [B, K], or else the drawn token [B]."""
    if draft_tokens.shape[1] == 0:
        return Verdict(accepted, drawn)
    kept = draft_tokens.gather(1, (accepted - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return Verdict(accepted, torch.where(accepted > 0, kept, drawn))


def match_candidates(drawn: Tensor, draft_tokens: Tensor) -> Verdict:
    """The target's own token [B], counted as accepted if it is among draft_tokens [B, K]."""
    hit = draft_tokens == drawn.unsqueeze(1)
    index = torch.arange(1, draft_tokens.shape[1] + 1, device=drawn.device)
    first = torch.where(hit & (hit.cumsum(1) == 1), index, 0).sum(1)
    return Verdict(first, drawn)


def check_step(
    target_probs: Tensor, draft_tokens: Tensor, draft_probs: Tensor | None, generator: torch.Generator | None
) -> None:
    """Shapes, dtypes and devices of one step with several candidates."""
    check_ids("draft_tokens", draft_tokens, 2)
    check_scores("target_probs", target_probs, 2, draft_tokens.device)
    if target_probs.shape[0] != draft_tokens.shape[0]:
        raise InputError(f"target_probs must be [{draft_tokens.shape[0]}, V], not {list(target_probs.shape)}")
    if draft_probs is not None:
        check_scores("draft_probs", draft_probs, 2, draft_tokens.device)
        if draft_probs.shape != target_probs.shape:
            raise InputError(f"draft_probs must be {list(target_probs.shape)}, not {list(draft_probs.shape)}")
    check_generator(generator, draft_tokens.device)
