"""Grouped speculative decoding (GSD).

So et al., "Grouped Speculative Decoding for Autoregressive Image Generation", arXiv 2508.07747.

    C = x and, of the G/2 tokens next above and the G/2 next below x in the order of p,
        those with |p(v) - p(x)| < 0.15 and a squared codebook distance to x below 0.5;
    accept x with probability min(1, Σ_C p / Σ_C q); at the first rejection draw from norm([p - q]+).

Guarantee: heuristic (tokens of a cluster are treated as interchangeable).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import ConfigError, InputError
from polyspec.verification.checks import check_chain, check_ids, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_tokens, leading, next_from_residual, uniform


@rule(guarantee="heuristic", paper="2508.07747", greedy=greedy_match)
def grouped(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    embeddings: Tensor | None = None,
    neighbours: Tensor | None = None,
    size: int = 10,
    gap: float = 0.15,
    distance: float = 0.5,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify the cluster of each drafted token in place of the token.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]. What is near in the codebook comes from embeddings [V, d] and `distance` (squared L2), or
    from neighbours [V, k] long (near: listed); with neither, closeness in p alone decides. size = G >= 2, cut to V.
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for knobs out of range.
    """
    _, length, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("size", size, 2)
    check_knob("gap", gap, 0)
    check_knob("distance", distance, 0)
    p = target_probs[:, :length]
    x = draft_tokens.unsqueeze(-1)
    p_x = p.gather(-1, x)

    half = min(size // 2, vocab)
    above = p.masked_fill(p < p_x, torch.inf).scatter_(-1, x, torch.inf).topk(half, largest=False)
    below = p.masked_fill(p >= p_x, -torch.inf).topk(half)
    cluster = torch.cat([above.indices, below.indices], -1)  # [B, N, 2·half]
    values = torch.cat([above.values, below.values], -1).float()
    member = (values - p_x.float()).abs() < gap  # infinite where there is no such rank
    member &= _near(draft_tokens, cluster, embeddings, neighbours, distance, vocab)

    p_cluster = at_tokens(p, draft_tokens) + torch.where(member, values, 0).sum(-1)
    q_cluster = torch.ones_like(p_cluster)
    if draft_probs is not None:
        near_q = torch.where(member, draft_probs.gather(-1, cluster).float(), 0)
        q_cluster = at_tokens(draft_probs, draft_tokens) + near_q.sum(-1)
    accepted = leading(uniform(draft_tokens, generator) * q_cluster < p_cluster)
    return Verdict(accepted, next_from_residual(accepted, draft_tokens, draft_probs, target_probs, generator))


def _near(
    draft_tokens: Tensor,
    cluster: Tensor,
    embeddings: Tensor | None,
    neighbours: Tensor | None,
    distance: float,
    vocab: int,
) -> Tensor:
    """Which of cluster [B, N, G] are near the drafted tokens [B, N] in the codebook; bool, broadcastable."""
    if embeddings is not None and neighbours is not None:
        raise ConfigError("give embeddings or neighbours, not both")
    for name, table in (("embeddings", embeddings), ("neighbours", neighbours)):
        if table is not None and (table.dim() != 2 or table.shape[0] != vocab or table.device != cluster.device):
            raise InputError(
                f"{name} must be [V={vocab}, ..] on {cluster.device}, not {list(table.shape)} on {table.device}"
            )
    if embeddings is not None:
        offset = embeddings[cluster].float() - embeddings[draft_tokens].unsqueeze(-2).float()
        return offset.square().sum(-1) < distance
    if neighbours is not None:
        check_ids("neighbours", neighbours, 2)
        return (cluster.unsqueeze(-1) == neighbours[draft_tokens].unsqueeze(-2)).any(-1)
    return torch.ones_like(cluster, dtype=torch.bool)
