"""Greedy plus one: the top k-1 draft tokens and one draw from the rest.

Hu et al., "Towards Optimal Multi-draft Speculative Decoding", arXiv 2502.18779.

    Top = the k-1 most likely tokens of q;  z ~ q', q' = q outside Top, renormalised;
    accept z with probability min(1, p(z) / q'(z)), else draw y ~ norm([p - q']+); y in Top counts as accepted.

Guarantee: exact. Acceptance p(Top) + Σ_{v not in Top} min(p, q'). The default wherever a top-k tree would otherwise
treat its tokens as deterministic (one-hot q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_generator, check_knob, check_scores
from polyspec.verification.recursive_rejection import check_step, match_candidates
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, sample, uniform


def greedy_plus_one_draft(draft_probs: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
    """draft_probs [.., V] -> candidates [.., k] long: the top k-1, then the draw (-1 if nothing is left to draw)."""
    check_scores("draft_probs", draft_probs, draft_probs.dim(), draft_probs.device)
    check_knob("k", k, 1, draft_probs.shape[-1])
    check_generator(generator, draft_probs.device)
    top = draft_probs.topk(k - 1, dim=-1).indices
    rest = draft_probs.float().scatter(-1, top, 0)
    return torch.cat([top, sample(rest, generator).unsqueeze(-1)], -1)


@rule(guarantee="exact", paper="2502.18779")
def greedy_plus_one(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify candidates drawn by `greedy_plus_one_draft`.

    target_probs [B, V]; draft_tokens [B, k] long, the drawn one last, k >= 1; draft_probs [B, V].
    Verdict: accepted = 1 + the index of the accepted candidate (0: none), next_token = the emitted token.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    check_step(target_probs, draft_tokens, draft_probs, generator)
    check_knob("k", draft_tokens.shape[1], 1)
    p, q = target_probs.float(), draft_probs.float().scatter(-1, draft_tokens[:, :-1], 0)
    q_total = q.sum(-1)
    z = draft_tokens[:, -1]
    at = z.clamp(min=0)
    kept = (uniform(z, generator) * at_tokens(q, at) < at_tokens(p, at) * q_total) & (z >= 0)
    scale = torch.where(q_total > 0, 1 / q_total, 0).unsqueeze(-1)  # no mass outside Top: z = -1 and q' = 0
    drawn = sample((p - q * scale).clamp_(min=0), generator, fallback=p)
    return match_candidates(torch.where(kept, z, drawn), draft_tokens)
