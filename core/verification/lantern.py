"""LANTERN and LANTERN++: acceptance that aggregates over interchangeable image tokens.

Jang et al., "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding", arXiv 2410.03355;
Park et al., "LANTERN++", arXiv 2502.06352.

    n_1 .. n_k: nearest neighbours of x in the codebook (L2, x excluded);  S_j = Σ_{i<=j} p(n_i);
    A = the longest prefix of neighbours with S_j <= δ (LANTERN) or S_j <= (λ-1)·p(x) (LANTERN++), S its mass;
    p̂(x) = p(x) + S,  p̂ = 0 on A,  p̂ = p elsewhere;
    accept x with probability min(1, p̂(x) / q(x)); at the first rejection draw from norm([p̂ - q]+).

Guarantee: bounded, for every drafted token x: TV(p, p̂_x) = S <= δ (LANTERN), p̂_x(x) <= λ·p(x) (LANTERN++).
The bound is on the distribution x is verified against. As that depends on x, the law of the emitted token can be
further from p than δ: with p flat over 1,000 tokens, q flat over 10 of them and δ = 0.1, everything is accepted and the
output is q. With LANTERN++ the probability of drawing and accepting v is still at most λ·p(v).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_chain, check_ids, check_knob
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, draft_row, leading, sample, uniform


@rule(guarantee="bounded", paper="2410.03355", takes=("neighbours",))
def lantern_greedy(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor,
    k: int = 1000,
    delta: float = 0.1,
    generator: torch.Generator | None = None,
) -> Verdict:
    """LANTERN at temperature 0: accept x if it is the argmax of p̂; then argmax p. Arguments as for `lantern`,
    target_probs being probabilities before any temperature."""
    check_knob("delta", delta, 0, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, k, generator)
    p_hat, _ = aggregate(draft_tokens, target_probs, near, delta)
    return _most_likely(draft_tokens, target_probs, p_hat)


@rule(guarantee="bounded", paper="2502.06352", takes=("neighbours",))
def lantern_pp_greedy(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor,
    k: int = 10,
    lam: float = 5.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """LANTERN++ at temperature 0: accept x if it is the argmax of p̂; then argmax p. Arguments as for `lantern_pp`,
    target_probs being probabilities before any temperature."""
    check_knob("lam", lam, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, k, generator)
    limit = (lam - 1) * at_tokens(target_probs[:, :-1], draft_tokens)
    p_hat, _ = aggregate(draft_tokens, target_probs, near, limit.unsqueeze(-1))
    return _most_likely(draft_tokens, target_probs, p_hat)


@rule(guarantee="bounded", paper="2410.03355", takes=("neighbours",), greedy=lantern_greedy)
def lantern(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor,
    k: int = 1000,
    delta: float = 0.1,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify a chain against p̂ with S <= delta.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]; neighbours [V, ..] long, every token's nearest others first (see `nearest_neighbours`), of
    which the first k >= 1 count; delta in [0, 1].
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    check_knob("delta", delta, 0, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, k, generator)
    return _verify(draft_tokens, draft_probs, target_probs, near, delta, generator)


@rule(guarantee="bounded", paper="2502.06352", takes=("neighbours",), greedy=lantern_pp_greedy)
def lantern_pp(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor,
    k: int = 10,
    lam: float = 5.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify a chain against p̂ with p̂(x) <= lam · p(x); lam >= 1, the other arguments as for `lantern`."""
    check_knob("lam", lam, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, k, generator)
    limit = (lam - 1) * at_tokens(target_probs[:, :-1], draft_tokens)
    return _verify(draft_tokens, draft_probs, target_probs, near, limit.unsqueeze(-1), generator)


def aggregate(draft_tokens: Tensor, target_probs: Tensor, near: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """(p̂(x) [B, N], A as a mask over near [B, N, k]) for S <= limit (a number or [B, N, 1])."""
    p = target_probs[:, : draft_tokens.shape[1]]
    near_p = p.gather(-1, near).float().masked_fill(near == draft_tokens.unsqueeze(-1), 0)
    mass = near_p.cumsum(-1)
    inside = mass <= limit
    return at_tokens(p, draft_tokens) + torch.where(inside, mass, 0).amax(-1), inside


def nearest_neighbours(embeddings: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """The table [V, k] long of nearest other tokens (L2, nearest first) of embeddings [V, d]; to be made once."""
    check_knob("k", k, 1, embeddings.shape[0] - 1)
    table, tokens = embeddings.float(), torch.arange(embeddings.shape[0], device=embeddings.device)

    def nearest(part: Tensor) -> Tensor:
        distance = torch.cdist(table[part], table).scatter_(-1, part.unsqueeze(-1), torch.inf)
        return distance.topk(k, largest=False).indices

    return torch.cat([nearest(part) for part in tokens.split(chunk)])


def _neighbours(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    neighbours: Tensor,
    k: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Check the inputs and look up the neighbours [B, N, k] of the drafted tokens."""
    _, _, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("k", k, 1)
    check_ids("neighbours", neighbours, 2)
    if neighbours.shape[0] != vocab or neighbours.shape[1] == 0 or neighbours.device != draft_tokens.device:
        raise InputError(
            f"the neighbour table must be [V={vocab}, >=1] on {draft_tokens.device}, "
            f"not {list(neighbours.shape)} on {neighbours.device}"
        )
    return neighbours[:, :k][draft_tokens]


def _verify(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    near: Tensor,
    limit: float | Tensor,
    generator: torch.Generator | None,
) -> Verdict:
    rows, length = draft_tokens.shape
    if length == 0:
        return Verdict(draft_tokens.new_zeros(rows), sample(target_probs[:, 0].float(), generator))
    p_hat, inside = aggregate(draft_tokens, target_probs, near, limit)
    q = torch.ones_like(p_hat) if draft_probs is None else at_tokens(draft_probs, draft_tokens)
    accepted = leading(uniform(draft_tokens, generator) * q < p_hat)

    # p̂ at the rejected position; after a full acceptance p as it is
    row = torch.arange(rows, device=draft_tokens.device)
    at = accepted.clamp(max=length - 1)
    rejected = (accepted < length).unsqueeze(-1)
    p = at_position(target_probs, accepted)
    near_p = p.gather(-1, near[row, at])
    weights = p.scatter(-1, near[row, at], near_p.masked_fill(inside[row, at] & rejected, 0))
    x = draft_tokens[row, at].unsqueeze(-1)
    weights.scatter_(-1, x, torch.where(rejected, p_hat[row, at].unsqueeze(-1), p.gather(-1, x)))
    weights.sub_(draft_row(draft_tokens, draft_probs, accepted, p.shape[-1])).clamp_(min=0)
    return Verdict(accepted, sample(weights, generator, fallback=p))


def _most_likely(draft_tokens: Tensor, target_probs: Tensor, p_hat: Tensor) -> Verdict:
    # if the argmax of p is in A then p̂(x) >= S covers it, so comparing with max p is enough
    accepted = leading(p_hat >= target_probs[:, : draft_tokens.shape[1]].amax(-1).float())
    return Verdict(accepted, at_position(target_probs, accepted).argmax(-1))
