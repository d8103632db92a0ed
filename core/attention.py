"""Grouped-query attention for a few query tokens, without copying the key-value cache.

`scaled_dot_product_attention` under a mask makes transformers repeat every key and value head for its group of query
heads: a copy of the whole cache in each layer. Laying a group's queries side by side as more query rows of one head
computes the same products on the cache as it is: on a CPU two to four times faster for 1 to 16 new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "polyspec_grouped"
MOST_ROWS = 128  # beyond this many query rows the products dominate and the copy no longer shows


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query `[S, H, T, D]` over key, value `[S, H', K, D]` under mask `[S or 1, 1, T, K]` -> `[S, T, H, D]`.

    Anything but plain grouped attention (a soft cap, a position bias, attention sinks, many queries) is left to
    transformers' own function.
    """
    streams, heads, new, dim = query.shape
    groups = heads // key.shape[1]
    special = any(kwargs.get(k) is not None for k in ("softcap", "position_bias", "s_aux", "cache"))
    special |= attention_mask is not None and attention_mask.shape[1] > 1  # heads that see different things
    unmasked = attention_mask is None and new > 1  # leaves causality to the kernel, which knows no groups
    if groups == 1 or special or dropout or groups * new > MOST_ROWS or unmasked:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows = query.reshape(streams, key.shape[1], groups * new, dim)
    mask = None if attention_mask is None else for_groups(attention_mask, groups)
    out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(streams, heads, new, value.shape[-1]).transpose(1, 2), None


_latest: tuple[Tensor, int, Tensor] | None = None


def for_groups(mask: Tensor, groups: int) -> Tensor:
    """`mask` repeated for every query head of a group, `[S or 1, 1, groups·T, K]`: made in the first layer, kept for the
    others, which get the same mask."""
    global _latest
    latest = _latest  # another thread may replace it meanwhile
    if latest is None or latest[0] is not mask or latest[1] != groups:
        _latest = latest = (mask, groups, mask.repeat(1, 1, groups, 1))
    return latest[2]


AttentionInterface.register(NAME, grouped_attention)


@contextmanager
def grouped(config: Any) -> Iterator[None]:
    """Use `grouped_attention` where the model with `config` would use sdpa."""
    if config._attn_implementation != "sdpa":
        yield
        return
    # the public setter validates against the hub and walks all sub-configurations: too slow for once a forward
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"
