"""The best path through heads that know nothing of each other, by which token follows which.

Nguyen et al., "Accelerating Codec-based Speech Synthesis with Multi-Token Prediction and Speculative Decoding", 2410.13839.
With q_1 … q_N the heads' distributions, x_0 the last committed token and A the matrix of token transitions, the draft is

    argmax over x_1 … x_N of Σ_i log q_i(x_i) + w · log A(x_{i-1}, x_i),

found by the Viterbi algorithm over each head's likeliest tokens. It is certain, so a lossless rule takes it as one-hot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def transitions(rows: Iterable[Sequence[int] | Tensor], vocab: int, smoothing: float = 0.1) -> Tensor:
    """log A `[V, V]` float32, row u the distribution of what follows u in token lists `rows`; `smoothing` is added to every
    count."""
    counts = torch.full((vocab * vocab,), smoothing)
    for row in rows:
        tokens = torch.as_tensor(row, dtype=torch.long)
        pairs = tokens[:-1] * vocab + tokens[1:]
        counts.scatter_add_(0, pairs, torch.ones(len(pairs)))
    return counts.view(vocab, vocab).log().log_softmax(-1)


def best_path(log_q: Tensor, log_a: Tensor, last: Tensor, candidates: int, weight: float = 1.0) -> Tensor:
    """The best tokens `[B, N]` by the heads' `log_q [B, N, V]` and the transitions `log_a [V, V]` from `last [B]` on, among
    the `candidates` likeliest of each head (V or more: all, and the path is the best of all)."""
    length, vocab = log_q.shape[1:]
    value, token = log_q.topk(min(candidates, vocab), dim=-1)
    best = value[:, 0] + weight * log_a[last].gather(1, token[:, 0])
    came = []
    for i in range(1, length):
        step = log_a[token[:, i - 1, :, None], token[:, i, None, :]]  # [B, C, C]
        best, before = (best[:, :, None] + weight * step).max(1)
        best = best + value[:, i]
        came.append(before)
    at = best.argmax(1, keepdim=True)
    path = [token[:, length - 1].gather(1, at)]
    for i in range(length - 1, 0, -1):
        at = came[i - 1].gather(1, at)
        path.append(token[:, i - 1].gather(1, at))
    return torch.cat(path[::-1], dim=1)
