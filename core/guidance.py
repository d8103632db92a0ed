"""Classifier-free guidance inside a target: a second stream of rows without the prompt, and how the two are combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def guide_log_probs(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance as transformers' text processor computes it, on log-probabilities (2306.17806)."""
    conditional, unconditional = conditional.float().log_softmax(-1), unconditional.float().log_softmax(-1)
    return scale * (conditional - unconditional) + unconditional


def guide_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance as image models compute it, on raw logits (2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True, slots=True)
class Guidance:
    """Unconditional prompts `[B, P]` (None: each row's last prompt token) and how to combine the two streams' logits."""

    scale: float
    tokens: Tensor | None = None
    mask: Tensor | None = None
    combine: Callable[[Tensor, Tensor, float], Tensor] = guide_log_probs
