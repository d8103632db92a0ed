"""What a target call of N tokens costs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from polyspec.target import Target

MOST, LEAST, PATIENCE = 31, 7, 10.0  # times, times, seconds


@torch.no_grad()
def time_calls(target: Target, token: torch.Tensor, sizes: Sequence[int]) -> dict[int, float]:
    """Median seconds of `target.forward` on N copies of `token [B, 1]` (N steps of them), measured in turn: 31 times, or for
    ten seconds if that is less, but seven times at least."""
    begun = time.perf_counter()
    kept = target.cache_lengths[: token.shape[0]]
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for repeat in range(MOST + 1):
        if repeat > LEAST and time.perf_counter() - begun > PATIENCE:
            break
        for n in sizes:
            start = time.perf_counter()
            target.forward(token.expand(-1, n * target.step)).logits[0, 0, 0].item()
            if repeat:
                seconds[n].append(time.perf_counter() - start)
            target.rollback(kept)
    return {n: sorted(s)[len(s) // 2] for n, s in seconds.items()}
