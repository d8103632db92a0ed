"""What a target call of N tokens costs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from polyspec.target import Target


@torch.no_grad()
def time_calls(target: Target, token: torch.Tensor, sizes: Sequence[int], repeats: int = 7) -> dict[int, float]:
    """Median seconds of `target.forward` on N copies of `token [B, 1]` (N steps of them), measured in turn."""
    kept = target.cache_lengths[: token.shape[0]]
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for repeat in range(repeats + 1):
        for n in sizes:
            start = time.perf_counter()
            target.forward(token.expand(-1, n * target.step)).logits[0, 0, 0].item()
            if repeat:
                seconds[n].append(time.perf_counter() - start)
            target.rollback(kept)
    return {n: sorted(s)[len(s) // 2] for n, s in seconds.items()}
