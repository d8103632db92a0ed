"""K-SEQ selection among independent candidates.

Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport", arXiv 2310.15141.

    accept each of k iid drafts in turn with probability min(1, p(x) / (ρ·q(x)));
    β(ρ) = Σ_v min(q(v), p(v)/ρ);  ρ in [1, k] solves 1 - (1-β)^k = ρ·β;
    if all are rejected draw from the residual ∝ p - min(q, p/ρ) · (1 - (1-β)^k) / β.

Guarantee: exact for any ρ with 1 - (1-β)^k <= ρ·β, so ρ is approached from above and needs few bisections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_knob
from polyspec.verification.recursive_rejection import check_step, choose
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import leading, sample, uniform


@rule(guarantee="exact", paper="2310.15141")
def kseq(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor,
    *,
    bisections: int = 12,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify K candidates drawn independently (with replacement) from one distribution.

    target_probs [B, V]; draft_tokens [B, K] long, K >= 1; draft_probs [B, V].
    Verdict: accepted = 1 + the index of the accepted candidate (0: none), next_token = the emitted token.
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for bisections.
    """
    check_step(target_probs, draft_tokens, draft_probs, generator)
    check_knob("K", draft_tokens.shape[1], 1)
    check_knob("bisections", bisections, 0)
    k = draft_tokens.shape[1]
    p, q = target_probs.float(), draft_probs.float()

    low, high = torch.ones_like(p[:, :1]), torch.full_like(p[:, :1], k)
    for _ in range(bisections if k > 1 else 0):
        middle = (low + high) / 2
        beta = torch.minimum(q, p / middle).sum(-1, keepdim=True)
        valid = _at_least_one(beta, k) <= middle * beta
        low, high = torch.where(valid, low, middle), torch.where(valid, middle, high)
    rho = high if k > 1 else low

    shared = torch.minimum(q, p / rho)
    beta = shared.sum(-1, keepdim=True)
    u = uniform(draft_tokens, generator)
    rejected = u * q.gather(1, draft_tokens) * rho >= p.gather(1, draft_tokens)
    accepted = leading(rejected) + 1
    accepted = torch.where(accepted > k, 0, accepted)
    scale = torch.where(beta > 0, _at_least_one(beta, k) / beta, 0)
    residual = (p - shared * scale).clamp_(min=0)
    return choose(accepted, draft_tokens, sample(residual, generator, fallback=p))


def _at_least_one(beta: Tensor, k: int) -> Tensor:
    """1 - (1 - β)^k, precise for small β."""
    return -torch.expm1(k * torch.log1p(-beta.clamp(max=1)))
