"""SpecHub: two candidates, one of which is always the hub.

Sun et al., "SpecHub: Provable Acceleration to Multi-Draft Speculative Decoding", arXiv 2411.05289.

    a = argmax q;  x_1 ~ q;  if x_1 = a then x_2 ~ q without a, else x_2 = a.
    Pair (x, a), mass q(x): accept x with min(1, p(x)/q(x)).
    Pair (a, x), mass Q = q(a)q(x)/(1-q(a)): accept x with min(1, [p(x)-q(x)]+ / Q).
    Otherwise, all that is left having the mass R = 1 - Σ_{v≠a} min(p(v), q(v)/(1-q(a))), accept a with min(1, p(a)/R);
    if that fails too, draw from norm([p(v) - q(v)/(1-q(a))]+) over v ≠ a.

Guarantee: exact, for the pairs `spechub_draft` draws. It is the best transport these pairs allow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_generator, check_scores
from polyspec.verification.recursive_rejection import check_step, choose
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, sample


def spechub_draft(draft_probs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw the pair [B, 2] from draft_probs [B, V]; the second is -1 where q is one-hot."""
    check_scores("draft_probs", draft_probs, 2, draft_probs.device)
    check_generator(generator, draft_probs.device)
    q = draft_probs.float()
    hub = q.argmax(-1)
    first = sample(q, generator)
    other = sample(q.scatter(-1, hub.unsqueeze(-1), 0), generator)
    return torch.stack([first, torch.where(first == hub, other, hub)], 1)


@rule(guarantee="exact", paper="2411.05289")
def spechub(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify a pair drawn by `spechub_draft`.

    target_probs [B, V]; draft_tokens [B, 2] long; draft_probs [B, V].
    Verdict: accepted = 1 + the index of the accepted candidate (0: none), next_token = the emitted token.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    check_step(target_probs, draft_tokens, draft_probs, generator)
    if draft_tokens.shape[1] != 2:
        raise InputError(f"spechub verifies two candidates, not {draft_tokens.shape[1]}")
    p, q = target_probs.float(), draft_probs.float()
    hub = q.argmax(-1)
    hub_first = draft_tokens[:, 0] == hub
    x = torch.where(hub_first, draft_tokens[:, 1], draft_tokens[:, 0])  # the candidate that is not the hub
    p_x, q_x = (torch.where(x >= 0, at_tokens(probs, x.clamp(min=0)), 0) for probs in (p, q))
    p_hub, q_hub = at_tokens(p, hub), at_tokens(q, hub)
    others = q.sum(-1) - q_hub

    inverse = torch.where(others > 0, 1 / others, 0)
    want = torch.where(hub_first, (p_x - q_x).clamp(min=0), p_x)
    mass = torch.where(hub_first, q_hub * q_x * inverse, q_x)
    u = torch.rand(2, len(p), generator=generator, device=p.device, dtype=torch.float32)
    takes_x = u[0] * mass < want

    reach = (q * inverse.unsqueeze(-1)).scatter_(-1, hub.unsqueeze(-1), 0)  # q / (1 - q(a)) off the hub
    pool = 1 - torch.minimum(p, reach).sum(-1)
    takes_hub = u[1] * pool < p_hub
    index = torch.where(hub_first, 2, 1)
    accepted = torch.where(takes_x & (x >= 0), index, torch.where(takes_hub, 3 - index, 0))
    residual = (p - reach).clamp_(min=0).scatter_(-1, hub.unsqueeze(-1), 0)
    return choose(accepted, draft_tokens, sample(residual, generator, fallback=p))
