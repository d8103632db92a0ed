"""A head's decoder layer evaluated with as few operations as it takes.

Beside a small target a drafter's step is not arithmetic but overhead: a transformers layer is some seventy operations, each
of which costs the same whether its tensors hold 256 numbers or a million. Here a layer is made ready once a model:

* W_q, W_k, W_v are one matrix, and so are the gate and the up projection;
* what RMSNorm multiplies by, γ √d, is folded into the matrix behind it, so that x / ‖(x, √(d ε))‖ remains;
* rows of W_q and W_k are interleaved so that the pairs which the rotary embedding turns lie side by side: one complex
  product by e^{iθt} from a table turns all heads of q and k;
* keys and values are kept in float32 on a CPU, whose bfloat16 attention costs several times as much for few rows;
* bfloat16 matrices are laid out for the processor once rather than in every call (`linear`).

The result is the layer's up to rounding. There are no gradients: training goes through the modules themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from polyspec.attention import for_groups
from polyspec.cache import RaggedCache
from polyspec.laid_out import Linear, linear


def rows_of(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """Some outputs of a linear layer, its rows `[n]`, as a layer of their own (a copy)."""
    weight = layer.weight.detach()[rows]
    chosen = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    chosen.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        chosen.bias = nn.Parameter(layer.bias.detach()[rows], requires_grad=False)
    return chosen


class Frozen:
    """Linear layers and what lies between them, one after the other, whose weights no longer change. Gradients reach the
    input where it asks for them."""

    def __init__(self, *stages: nn.Module):
        self.stages = stages
        self.ready = [linear(s.weight, s.bias) if isinstance(s, nn.Linear) else s for s in stages]
        self.dtype = next(s.weight.dtype for s in stages if isinstance(s, nn.Linear))

    def __call__(self, x: Tensor) -> Tensor:
        plain = x.requires_grad or x.dtype != self.dtype  # in training, under autocast too
        for stage in self.stages if plain else self.ready:
            x = stage(x)
        return x


def stacked(projections: Sequence[Any], scale: Tensor | None = None) -> Linear:
    """Several linear layers of one input as one, their outputs side by side; scale `[d]` multiplies the input first."""
    weight = torch.cat([p.weight.detach() for p in projections])
    bias = None if projections[0].bias is None else torch.cat([p.bias.detach() for p in projections])
    return linear(weight if scale is None else (weight.float() * scale).to(weight.dtype), bias)


class Interleaved:
    """The rows of a projection to heads of `dim`, `0, dim/2, 1, dim/2 + 1, …`: pairs that are turned together adjoin."""

    def __init__(self, projection: Any, dim: int):
        def ordered(rows: Tensor) -> Tensor:
            return rows.detach().unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)

        self.weight = ordered(projection.weight)
        self.bias = None if projection.bias is None else ordered(projection.bias)


def gain(norm: Any) -> Tensor:
    """γ √d of an RMSNorm, what `unit` leaves out."""
    return norm.weight.detach().float() * norm.weight.numel() ** 0.5


def unit(x: Tensor, floor: Tensor) -> Tensor:
    """`x [.., d]` over the length of (x, floor): RMSNorm but for γ √d if floor is √(d ε)."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def floor(width: int, eps: float, device: torch.device) -> Tensor:
    """√(d ε) for `unit`."""
    return torch.tensor((width * eps) ** 0.5, device=device)


class Turns:
    """e^{iθt} of a rotary embedding for every position t, `[T, 1, D/2]`, in a table that grows as it must."""

    def __init__(self, config: Any, device: torch.device):
        # of its own: a head's was rounded when the head was brought to the target's dtype
        self.rotary, self.device = LlamaRotaryEmbedding(config).to(device), device
        self.table = torch.empty(0, 1, 1)

    def upto(self, count: int) -> Tensor:
        if count > len(self.table):
            rows = torch.arange(max(count, 2 * len(self.table), 256), device=self.device)
            cos, sin = self.rotary(torch.zeros(1, device=self.device), rows[None])
            half = cos.shape[-1] // 2
            self.table = torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])
        return self.table

    def behind(self, cache: RaggedCache, count: int) -> Tensor:
        """Of the next `count` tokens behind those kept of every row, `[T, 1, D/2]` or `[S, T, 1, D/2]`."""
        table = self.upto(cache.longest + count)
        if cache.uniform:
            return table[cache.longest : cache.longest + count]
        start = torch.tensor(cache.lengths, device=self.device)[:, None]
        return table[start + torch.arange(count, device=self.device)]


class LeanLayer:
    """A Llama decoder layer from its parts; `config` gives its heads, `index` its place in the cache."""

    def __init__(self, attention: Any, mlp: Any, norms: tuple[Any, Any], config: Any, index: int = 0):
        weight = attention.q_proj.weight
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.dim, self.index, self.dtype = weight.shape[0] // self.heads, index, weight.dtype
        self.inner = torch.float32 if weight.device.type == "cpu" else weight.dtype
        before, behind = (gain(norm) for norm in norms)
        queries, keys = (Interleaved(p, self.dim) for p in (attention.q_proj, attention.k_proj))
        self.qkv = stacked([queries, keys, attention.v_proj], before)
        self.out = stacked([attention.o_proj])
        self.gate_up = stacked([mlp.gate_proj, mlp.up_proj], behind)
        self.down, self.act = stacked([mlp.down_proj]), mlp.act_fn
        self.floor = floor(weight.shape[1], config.rms_norm_eps, weight.device)

    def normed(self, x: Tensor) -> Tensor:
        return unit(x, self.floor).to(self.dtype)

    def heads_of(self, projected: Tensor, turns: Tensor) -> Tensor:
        """Queries or keys `[S, T, H·D]`, interleaved, turned by `turns [.., T, 1, D/2]` to `[S, H, T, D]`."""
        pairs = projected.float().unflatten(-1, (-1, self.dim // 2, 2))
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(self.inner).transpose(1, 2)

    def values_of(self, projected: Tensor) -> Tensor:
        """Values `[S, T, H·D]` as `[S, H, T, D]`."""
        return projected.to(self.inner).unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def __call__(self, x: Tensor, turns: Tensor, mask: Tensor | None, cache: RaggedCache, last: bool = False) -> Tensor:
        """`x [S, T, d]` float32 to the same, its keys and values written to `cache`; turns `[.., T, 1, D/2]`; mask
        `[S or 1, 1, T or 1, K]`, True = visible, None = everything. last: of the T only what the last becomes."""
        both, values = self.qkv(self.normed(x)).split(
            [(self.heads + self.shared) * self.dim, self.shared * self.dim], dim=-1
        )
        queries, keys = self.heads_of(both, turns).split([self.heads, self.shared], dim=1)
        k, v = cache.update(keys, self.values_of(values), self.index)
        if last:
            x, queries = x[:, -1:], queries[:, :, -1:]
        # a group's query heads as more rows of one key-value head, so that the cache is never copied
        groups, shape = self.heads // self.shared, queries.shape
        rows = queries.reshape(shape[0], self.shared, -1, self.dim)
        if mask is not None and groups > 1 and mask.shape[2] > 1:
            mask = for_groups(mask, groups)
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(shape)
        x = x + self.out(out.transpose(1, 2).flatten(2).to(self.dtype))
        gate, up = self.gate_up(self.normed(x)).chunk(2, dim=-1)
        return x + self.down(self.act(gate) * up)
