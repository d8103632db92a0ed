"""Annealed relaxation (Cool-SD).

Li et al., "Annealed Relaxation of Speculative Decoding for Faster Autoregressive Image Generation", arXiv 2601.09212.

    ω_i = δ · exp(-ν·i - μ), i = 0 .. N-1;
    accept x_i with f_i(x_i) = min(1, ω_i · p_i(x_i) / q_i(x_i));
    at the first rejection draw from norm([p_i - q_i·f_i]+).

Guarantee: bounded. The token emitted at step i is v with a probability of at most max(1, ω_i) · p_i(v), and its law has
a total variation distance from p_i of Σ_v [min(q_i, ω_i·p_i) - p_i]+ <= min(TV(p_i, q_i), ω_i - 1). With ω_i <= 1 it
is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, draft_row, leading, sample, uniform


@rule(guarantee="bounded", paper="2601.09212", greedy=greedy_match)
def cool_sd(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    delta: float = 2.0,
    nu: float = 0.1,
    mu: float = 0.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Speculative sampling with an acceptance that is relaxed less and less along the chain.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]; delta, nu, mu >= 0 (delta = 1, nu = mu = 0 is speculative sampling).
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    _, length, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("delta", delta, 0)
    check_knob("nu", nu, 0)
    check_knob("mu", mu, 0)
    if length == 0:
        return Verdict(draft_tokens.new_zeros(draft_tokens.shape[0]), sample(target_probs[:, 0].float(), generator))
    omega = delta * torch.exp(-nu * torch.arange(length, device=draft_tokens.device, dtype=torch.float32) - mu)
    p = at_tokens(target_probs[:, :length], draft_tokens)
    q = torch.ones_like(p) if draft_probs is None else at_tokens(draft_probs, draft_tokens)
    accepted = leading(uniform(draft_tokens, generator) * q < omega * p)

    p_next = at_position(target_probs, accepted)
    q_next = draft_row(draft_tokens, draft_probs, accepted, vocab)  # zero after a full acceptance: the residual is p
    taken = torch.minimum(q_next, p_next * omega[accepted.clamp(max=length - 1)].unsqueeze(-1))
    return Verdict(accepted, sample((p_next - taken).clamp_(min=0), generator, fallback=p_next))
