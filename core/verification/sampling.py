"""Drawing tokens, and the step every chain rule shares: stop at the first rejection, draw from what is left.

Nothing here synchronises with the device, loops over rows or tokens, or keeps a float32 copy of a whole [B,N,V] tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256  # tokens summed together before the inverse-CDF search: one short scan instead of one over V


def wide(device: torch.device) -> torch.dtype:
    """The widest float the device has: float64 but for MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def sample(weights: Tensor, generator: torch.Generator | None = None, fallback: Tensor | None = None) -> Tensor:
    """Draw one token per row from unnormalised `weights [..., V] >= 0` -> [...] long.

    A row whose weights are all zero is drawn from `fallback [..., V]` if given. A row that is NaN, infinite or (without
    a fallback) all zero yields -1, so that it cannot pass for a token. Zero-weight tokens are never drawn.

    Inverse CDF in two levels (blocks, then tokens in the block): at V = 49,152 on a CPU this is many times faster than
    `torch.multinomial` or an exponential race, which need V random numbers a row.
    """
    if fallback is not None:
        weights = torch.where(weights.sum(-1, keepdim=True) == 0, fallback, weights)
    shape, vocab = weights.shape[:-1], weights.shape[-1]
    rows, dtype = weights.reshape(-1, vocab), wide(weights.device)
    # below one even where the device's widest float rounds a uniform draw up
    ceiling = 1 - torch.finfo(dtype).eps
    level = torch.rand(rows.shape[0], 1, generator=generator, device=rows.device, dtype=dtype).clamp_(max=ceiling)
    if vocab <= 4 * BLOCK:
        token, total = _invert(rows.cumsum(-1, dtype=dtype), level)
    else:
        blocks = functional.pad(rows, (0, -vocab % BLOCK)).unflatten(-1, (-1, BLOCK))
        sums = blocks.sum(-1, dtype=torch.float32).to(dtype)  # [R, V/BLOCK]
        cdf = sums.cumsum(-1)
        block, total = _invert(cdf, level)
        size = sums.gather(-1, block)
        level = ((level * total - (cdf.gather(-1, block) - size)) / size).clamp(0, ceiling)  # place inside the block
        inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
        token = block * BLOCK + _invert(inside.cumsum(-1, dtype=dtype), level)[0]
    return torch.where((total > 0) & (total < torch.inf), token, -1).reshape(shape)


def _invert(cdf: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Where an unnormalised cdf [R, K] passes level [R, 1] in [0, 1), and its total: [R, 1] both."""
    total = cdf[:, -1:]
    return torch.searchsorted(cdf, level * total, right=True).clamp_(max=cdf.shape[-1] - 1), total


def at_tokens(probs: Tensor, tokens: Tensor) -> Tensor:
    """probs [..., V], tokens [...] -> probs of those tokens [...] in float32."""
    return probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()


def at_position(probs: Tensor, position: Tensor) -> Tensor:
    """probs [B, T, V], position [B] -> the rows at those positions [B, V] in float32."""
    return probs[torch.arange(probs.shape[0], device=probs.device), position].float()


def leading(accept: Tensor) -> Tensor:
    """accept [B, N] bool -> [B] long: how many come before the first False."""
    return accept.long().cumprod(1).sum(1)


def uniform(tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """One uniform number in [0, 1) per token, float32, in the shape of `tokens`."""
    return torch.rand(tokens.shape, generator=generator, device=tokens.device, dtype=torch.float32)


def draft_row(draft_tokens: Tensor, draft_probs: Tensor | None, accepted: Tensor, vocab: int) -> Tensor:
    """The draft distribution at the rejected position [B, V] float32; all zero in rows that accepted everything."""
    rows, length = draft_tokens.shape
    position = accepted.clamp(max=length - 1)
    rejected = (accepted < length).float().unsqueeze(-1)
    if draft_probs is not None:
        return at_position(draft_probs, position) * rejected
    q = torch.zeros(rows, vocab, device=draft_tokens.device, dtype=torch.float32)
    return q.scatter_(-1, draft_tokens.gather(-1, position.unsqueeze(-1)), rejected)


def next_from_residual(
    accepted: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """The token after the accepted ones [B]: from norm([p-q]+) at a rejection, from p after a full acceptance."""
    p = at_position(target_probs, accepted)
    if draft_tokens.shape[1] == 0:
        return sample(p, generator)
    q = draft_row(draft_tokens, draft_probs, accepted, p.shape[-1])
    return sample((p - q).clamp_(min=0), generator, fallback=p)
