"""What a target call of N tokens costs on this machine, measured once a model."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from polyspec.drafting.base import Context

# time of a target call by number of tokens, in calls of one token; measured once per (model, dtype, device, streams)
_COSTS: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, str, int], dict[int, float]]] = (
    weakref.WeakKeyDictionary()
)
SIZES = (1, 2, 3, 5, 9, 17, 33)
ENOUGH, MEASURING = 2.5, 1.0


def call_costs(context: Context, most: int) -> dict[int, float]:
    """What forwards of 1, 2, 3, 5, 9, … tokens (steps, where the target has such) cost, up to `most`, behind the present
    cache, in forwards of one token.

    Interleaved passes, of which the fastest counts, three or as many as `MEASURING` seconds allow, and no number of tokens
    costs more than a larger one; measured once a model and process. Sizes beyond one that costs more than `ENOUGH` are taken
    from the line through the last two. Ratios, because a machine's speed drifts more than they do.
    """
    target = context.target
    key = (str(target.model.dtype), str(target.device), len(target.cache_lengths))
    known = _COSTS.setdefault(target.model, {}).setdefault(key, {})
    sizes = [n for n in SIZES if n < 2 * most]
    if set(sizes) <= set(known):
        return known
    token, kept = context.sequences.tail(1), context.sequences.cached
    seconds: dict[int, float] = {}
    begun = time.perf_counter()
    for turn in range(3):
        if turn and time.perf_counter() - begun > MEASURING:
            break
        for size in sizes:
            start = time.perf_counter()
            tokens = token.expand(-1, size * target.step)
            logits = target.forward(tokens).logits
            context.processing.scores(logits, context.sequences, tokens[:, 1:])[0, 0, 0].item()
            seconds[size] = min(seconds.get(size, float("inf")), time.perf_counter() - start)
            target.rollback(kept)
            if size > 1 and seconds[size] > ENOUGH * seconds[1]:
                sizes = [n for n in sizes if n <= size]
                break
    fastest = float("inf")
    for size in sorted(seconds, reverse=True):  # noise only adds: fewer tokens never take longer than more do
        fastest = seconds[size] = min(seconds[size], fastest)
    known.update({n: s / seconds[1] for n, s in seconds.items()})
    known.update({n: along_line(known, n) for n in SIZES if n < 2 * most and n not in known})
    return known


def along_line(costs: Mapping[int, float], tokens: int) -> float:
    """Costs by number of tokens, on the line through the two largest numbers."""
    low, high = sorted(costs)[-2:]
    return costs[high] + max(costs[high] - costs[low], 0.0) / (high - low) * (tokens - high)
