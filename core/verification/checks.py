"""Input checks for the acceptance rules.

Rules check shapes, dtypes and devices on every call, because that costs no device synchronisation. What has to look at
the values (a sum of one, NaN, a token outside the vocabulary) is in `check_inputs`, which synchronises; call it once
where a draft enters, or while debugging. Without it a NaN still never picks a token: the rule emits -1, which no
embedding accepts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import ConfigError, InputError


def check_chain(
    draft_tokens: Tensor, draft_probs: Tensor | None, target_probs: Tensor, generator: torch.Generator | None = None
) -> tuple[int, int, int]:
    """Shapes, dtypes and devices of one drafted chain; returns (B, N, V)."""
    check_ids("draft_tokens", draft_tokens, 2)
    check_scores("target_probs", target_probs, 3, draft_tokens.device)
    rows, length = draft_tokens.shape
    vocab = target_probs.shape[-1]
    if target_probs.shape[:2] != (rows, length + 1):
        raise InputError(
            f"target_probs must be [B, N+1, V] = [{rows}, {length + 1}, V] for draft_tokens [{rows}, {length}], "
            f"not {list(target_probs.shape)}"
        )
    if draft_probs is not None:
        check_scores("draft_probs", draft_probs, 3, draft_tokens.device)
        if draft_probs.shape != (rows, length, vocab):
            raise InputError(f"draft_probs must be [{rows}, {length}, {vocab}], not {list(draft_probs.shape)}")
    check_generator(generator, draft_tokens.device)
    return rows, length, vocab


def check_ids(name: str, tokens: Tensor, dims: int) -> None:
    """`tokens` is a long tensor with `dims` dimensions."""
    if tokens.dim() != dims:
        raise InputError(f"{name} must have {dims} dimensions, not {list(tokens.shape)}")
    if tokens.dtype != torch.long:
        raise InputError(f"{name} must be torch.long, not {tokens.dtype}")


def check_scores(name: str, scores: Tensor, dims: int, device: torch.device) -> None:
    """`scores` is a floating-point tensor with `dims` dimensions and a non-empty vocabulary, on `device`."""
    if scores.dim() != dims:
        raise InputError(f"{name} must have {dims} dimensions, not {list(scores.shape)}")
    if not scores.dtype.is_floating_point:
        raise InputError(f"{name} must be floating point, not {scores.dtype}")
    if scores.shape[-1] == 0:
        raise InputError(f"{name} has an empty vocabulary")
    if scores.device != device:
        raise InputError(f"{name} is on {scores.device} but the tokens are on {device}")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """A generator, if given, lives on the tensors' kind of device."""
    if generator is not None and generator.device.type != device.type:
        raise InputError(f"the generator is on {generator.device} but the tensors are on {device}")


def check_knob(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """A knob lies in [low, high] (NaN never does)."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must be in [{low:g}, {high:g}], not {value!r}")


def check_probabilities(name: str, probs: Tensor, tolerance: float = 1e-3) -> None:
    """Raise InputError unless `probs [..., V]` is non-negative, finite and sums to one; synchronises."""
    lowest, total = probs.amin(-1), probs.sum(-1, dtype=torch.float32)
    if not bool((lowest >= 0).all()):
        raise InputError(f"{name} contains negative values or NaN")
    if not bool(((total - 1).abs() <= tolerance).all()):
        worst = total.flatten()[(total - 1).abs().nan_to_num(torch.inf).argmax()]
        raise InputError(f"{name} must sum to one over the vocabulary; one row sums to {float(worst):.6g}")


def check_tokens(name: str, tokens: Tensor, vocab: int) -> None:
    """Raise InputError unless every token is in [0, vocab); synchronises."""
    if tokens.numel() and not bool(((tokens >= 0) & (tokens < vocab)).all()):
        raise InputError(f"{name} must be in [0, {vocab}); it spans [{int(tokens.min())}, {int(tokens.max())}]")


def check_inputs(
    draft_tokens: Tensor, draft_probs: Tensor | None, target_probs: Tensor, generator: torch.Generator | None = None
) -> None:
    """Everything a chain rule needs of its inputs, values included; synchronises. Raises InputError."""
    _, _, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_tokens("draft_tokens", draft_tokens, vocab)
    check_probabilities("target_probs", target_probs)
    if draft_probs is not None:
        check_probabilities("draft_probs", draft_probs)
