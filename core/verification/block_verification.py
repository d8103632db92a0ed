"""Block verification.

Sun et al., "Block Verification Accelerates Speculative Decoding", arXiv 2403.10444.

    P_0 = 1,  P_i = min(1, P_{i-1} · p_i(x_i) / q_i(x_i));
    h_i = R_i / (R_i + 1 - P_i) with R_i = Σ_v [P_i · p_{i+1}(v) - q_{i+1}(v)]+ for i < N,  h_N = P_N;
    η_i uniform for every i; τ = the largest i with η_i < h_i (0 if none);
    τ < N: draw from norm([P_τ · p_{τ+1} - q_{τ+1}]+);  τ = N: draw from p_{N+1}.

Guarantee: exact, and never fewer tokens in expectation than speculative sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, draft_row, sample, uniform, wide


@rule(guarantee="exact", paper="2403.10444", greedy=greedy_match)
def block_verification(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify one drafted chain as a block.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]. N = 0 draws a token from the target.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    _, length, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    if length == 0:
        return Verdict(draft_tokens.new_zeros(draft_tokens.shape[0]), sample(target_probs[:, 0].float(), generator))
    p = at_tokens(target_probs[:, :length], draft_tokens)
    q = torch.ones_like(p) if draft_probs is None else at_tokens(draft_probs, draft_tokens)
    joint = joint_acceptance(p, q)  # P_0 .. P_N

    before = joint[:, :length]
    if draft_probs is None:  # [P·p - one_hot(x)]+ sums to P·(1 - p(x))
        excess = before * (1 - p).clamp(min=0)
    else:
        excess = (target_probs[:, :length] * before.unsqueeze(-1)).sub_(draft_probs).clamp_(min=0).sum(-1)
    scale = excess + 1 - before
    stop_here = torch.where(scale == 0, 1, excess / scale)  # 0/0: P = 1 and p = q; NaN (nothing allowed there) stays
    h = torch.cat([stop_here[:, 1:], joint[:, length:]], 1)  # h_1 .. h_N; h_0 is never needed

    steps = torch.arange(1, length + 1, device=draft_tokens.device)
    accepted = torch.where(uniform(draft_tokens, generator) < h, steps, 0).amax(1)

    p_next = at_position(target_probs, accepted)
    weight = joint.gather(1, accepted.unsqueeze(-1))
    weight = torch.where(accepted.unsqueeze(-1) < length, weight, 1)
    residual = (p_next * weight).sub_(draft_row(draft_tokens, draft_probs, accepted, vocab)).clamp_(min=0)
    return Verdict(accepted, sample(residual, generator, fallback=p_next))


def joint_acceptance(p: Tensor, q: Tensor) -> Tensor:
    """P_0 .. P_N [B, N+1] from p(x), q(x) [B, N].

    With S the running sum of log p - log q, log P_i = S_i - max_{j<=i} S_j: the recursion without a loop.
    """
    ratio = torch.where(p > 0, p / q, 0).to(wide(p.device))
    steps = ratio.log().clamp(max=100.0)  # q(x) = 0 < p(x): as good as certain
    walk = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    return (walk - walk.cummax(1).values).exp().to(p.dtype)
