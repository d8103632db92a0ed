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

from polyspec.errors import ConfigError, InputError
from polyspec.verification.checks import check_chain, check_ids, check_knob
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, draft_row, leading, sample, uniform


@rule(guarantee="bounded", paper="2410.03355")
def lantern_greedy(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor | None = None,
    embeddings: Tensor | None = None,
    k: int = 1000,
    delta: float = 0.1,
    generator: torch.Generator | None = None,
) -> Verdict:
    """LANTERN at temperature 0: accept x if it is the argmax of p̂; then argmax p. Arguments as for `lantern`,
    target_probs being probabilities before any temperature."""
    check_knob("delta", delta, 0, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, embeddings, k, generator)
    p_hat, _ = aggregate(draft_tokens, target_probs, near, delta)
    return _most_likely(draft_tokens, target_probs, p_hat)


@rule(guarantee="bounded", paper="2502.06352")
def lantern_pp_greedy(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor | None = None,
    embeddings: Tensor | None = None,
    k: int = 10,
    lam: float = 5.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """LANTERN++ at temperature 0: accept x if it is the argmax of p̂; then argmax p. Arguments as for `lantern_pp`,
    target_probs being probabilities before any temperature."""
    check_knob("lam", lam, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, embeddings, k, generator)
    limit = (lam - 1) * at_tokens(target_probs[:, :-1], draft_tokens)
    p_hat, _ = aggregate(draft_tokens, target_probs, near, limit.unsqueeze(-1))
    return _most_likely(draft_tokens, target_probs, p_hat)


@rule(guarantee="bounded", paper="2410.03355", greedy=lantern_greedy)
def lantern(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor | None = None,
    embeddings: Tensor | None = None,
    k: int = 1000,
    delta: float = 0.1,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify a chain against p̂ with S <= delta.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]. Give neighbours [V, >=k] long (nearest first, see `nearest_neighbours`) or embeddings
    [V, d], which costs a search on every call. k >= 1 is cut to what there is; delta in [0, 1].
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    check_knob("delta", delta, 0, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, embeddings, k, generator)
    return _verify(draft_tokens, draft_probs, target_probs, near, delta, generator)


@rule(guarantee="bounded", paper="2502.06352", greedy=lantern_pp_greedy)
def lantern_pp(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    neighbours: Tensor | None = None,
    embeddings: Tensor | None = None,
    k: int = 10,
    lam: float = 5.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify a chain against p̂ with p̂(x) <= lam · p(x); lam >= 1, the other arguments as for `lantern`."""
    check_knob("lam", lam, 1)
    near = _neighbours(draft_tokens, draft_probs, target_probs, neighbours, embeddings, k, generator)
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
    tokens = torch.arange(embeddings.shape[0], device=embeddings.device)
    return torch.cat([_nearest(part, embeddings, k) for part in tokens.split(chunk)])


def _nearest(tokens: Tensor, embeddings: Tensor, k: int) -> Tensor:
    """tokens [n] -> their k nearest others [n, k]."""
    table = embeddings.float()
    distance = torch.cdist(table[tokens], table).scatter_(-1, tokens.unsqueeze(-1), torch.inf)
    return distance.topk(k, largest=False).indices


def _neighbours(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    neighbours: Tensor | None,
    embeddings: Tensor | None,
    k: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Check the inputs and look up the neighbours [B, N, k] of the drafted tokens."""
    _, _, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("k", k, 1)
    if (neighbours is None) == (embeddings is None):
        raise ConfigError("give exactly one of neighbours [V, k] and embeddings [V, d]")
    table = neighbours if embeddings is None else embeddings
    assert table is not None
    if table.dim() != 2 or table.shape[0] != vocab or table.shape[1] == 0 or table.device != draft_tokens.device:
        raise InputError(
            f"the codebook table must be [V={vocab}, >=1] on {draft_tokens.device}, "
            f"not {list(table.shape)} on {table.device}"
        )
    if neighbours is not None:
        check_ids("neighbours", neighbours, 2)
        return neighbours[:, :k][draft_tokens]
    near = _nearest(draft_tokens.flatten(), table, max(min(k, vocab - 1), 1))
    return near.unflatten(0, draft_tokens.shape)


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
