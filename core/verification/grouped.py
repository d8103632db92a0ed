"""Grouped speculative decoding (GSD).

So et al., "Grouped Speculative Decoding for Autoregressive Image Generation", arXiv 2508.07747.

    C = x and, of the G/2 tokens next above and the G/2 next below x in the order of p,
        those with |p(v) - p(x)| < 0.15 and a squared codebook distance to x below 0.5;
    accept x with probability min(1, Σ_C p / Σ_C q); at the first rejection draw from norm([p - q]+).

Guarantee: heuristic (tokens of a cluster are treated as interchangeable).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, leading, next_from_residual, sample, uniform
from polyspec.verification.sjd import redraw_behind


@rule(guarantee="heuristic", paper="2508.07747", greedy=greedy_match, takes=("codebook",))
def grouped(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    codebook: Tensor | None = None,
    size: int = 10,
    gap: float = 0.15,
    distance: float = 0.5,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify the cluster of each drafted token in place of the token.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]; codebook [V, d], None: closeness in p alone decides. size = G >= 2, cut to V; gap and
    distance (squared L2) bound how far from x a token of its cluster may lie in p and in the codebook.
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    _, length, _ = check_chain(draft_tokens, draft_probs, target_probs, generator)
    p_cluster, q_cluster = masses(draft_tokens, draft_probs, target_probs[:, :length], codebook, size, gap, distance)
    accepted = leading(uniform(draft_tokens, generator) * q_cluster < p_cluster)
    return Verdict(accepted, next_from_residual(accepted, draft_tokens, draft_probs, target_probs, generator))


@rule(guarantee="heuristic", paper="2508.07747", takes=("codebook",))
def gsd(
    x: Tensor,
    q: Tensor,
    p: Tensor,
    *,
    codebook: Tensor | None = None,
    size: int = 10,
    gap: float = 0.15,
    distance: float = 0.5,
    generator: torch.Generator | None = None,
    noise: Any = None,
) -> tuple[Tensor, Tensor]:
    """The same in a Jacobi window, as published (Algorithm 1): x `[B, W]` drawn from q `[B, W, V]` against
    p `[B, W+1, V]`; otherwise as `sjd`. Returns `y [B, W+1]` and `kept [B, W]`; noise is not used."""
    p_cluster, q_cluster = masses(x, q, p[:, :-1], codebook, size, gap, distance)
    kept = uniform(x, generator) * q_cluster < p_cluster
    drawn = sample((p[:, :-1] - q).clamp_(min=0), generator, fallback=p[:, :-1])
    return redraw_behind(torch.where(kept, x, drawn), kept, p, generator), kept


def masses(
    x: Tensor, q: Tensor | None, p: Tensor, codebook: Tensor | None, size: int, gap: float, distance: float
) -> tuple[Tensor, Tensor]:
    """(Σ_C p, Σ_C q), `[B, N]` both, of the clusters C of x `[B, N]`; q, p `[B, N, V]`, q None: one-hot."""
    check_knob("size", size, 2)
    check_knob("gap", gap, 0)
    check_knob("distance", distance, 0)
    vocab = p.shape[-1]
    if codebook is not None and (codebook.dim() != 2 or codebook.shape[0] != vocab or codebook.device != x.device):
        raise InputError(
            f"codebook must be [V={vocab}, d] on {x.device}, not {list(codebook.shape)} on {codebook.device}"
        )
    p_x, half = p.gather(-1, x.unsqueeze(-1)), min(size // 2, vocab)
    above = p.masked_fill(p < p_x, torch.inf).scatter_(-1, x.unsqueeze(-1), torch.inf).topk(half, largest=False)
    below = p.masked_fill(p >= p_x, -torch.inf).topk(half)
    cluster = torch.cat([above.indices, below.indices], -1)  # [B, N, 2·half]
    values = torch.cat([above.values, below.values], -1).float()
    member = (values - p_x.float()).abs() < gap  # infinite where there is no such rank
    if codebook is not None:
        offset = codebook[cluster].float() - codebook[x].unsqueeze(-2).float()
        member &= offset.square().sum(-1) < distance
    p_cluster = at_tokens(p, x) + torch.where(member, values, 0).sum(-1)
    if q is None:
        return p_cluster, torch.ones_like(p_cluster)
    return p_cluster, at_tokens(q, x) + torch.where(member, q.gather(-1, cluster).float(), 0).sum(-1)
