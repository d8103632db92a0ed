"""A small parallel model drafts a whole block in one pass.

DFlash: Block Diffusion for Flash Speculative Decoding, 2602.06036. With x_0 the last committed token, the block

    e(x_0), m, m, …, m      (N queries; e the target's embedding, m a learnt mask embedding)

attends to itself in both directions and to the committed tokens before it; output i, through the target's output layer,
is q_i, the drafter's distribution of the i-th next token, i = 1 … N-1. The q_i are independent of each other, so depth
and block size cost almost nothing. Context enters as keys and values only: for every committed token t the target's
hidden states of several layers, h_t^{l_1} … h_t^{l_k}, become

    c_t = RMSNorm(W_fuse [ĥ_t^{l_1}; …; ĥ_t^{l_k}]),    K_t^j = RoPE(W_K^j c_t),    V_t^j = W_V^j c_t

(ĥ: h over its root mean square) once, for each draft layer j with that layer's own matrices, and stay in the drafter's
own cache. Embedding and output layer are the target's, shared and frozen. Exact under any exact rule.

Not in the paper: with `bridge`, W_b [e(x_0); c_{-1}], c of the token before x_0, is added to every query, every place has
a mask embedding of its own, and the last of the hidden states fused is the target's last. A block drafter trained for minutes
rather than days has not learnt yet to fetch all that by attention; it costs one matrix. It starts from W_fuse and W_b that
hand the target's last hidden state on, so that the first predictions are the target's own of a token earlier (as EAGLE's).

With `recurrent` = r > 0, place i also learns which tokens were drafted before it, from a state of width r that is carried
along the block as in the Recurrent Drafter (2403.09919):

    s_i = silu(W_h h_i + W_e e(x_{i-1}) + W_s s_{i-1}),    s_0 = 0,    q_i = softmax(W_U (h_i + W_o s_i))

with h_i output i of the parallel pass. That is still one pass a block; only four small matrices and the output layer go
from place to place. Without it q_2 has to cover every continuation of every x_1, which costs a drafter of few layers half
of its accepted tokens behind the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from polyspec.cache import RaggedCache
from polyspec.drafting.base import Context, Draft
from polyspec.drafting.heads import HeadConfig, HeadDrafter, HeadModel
from polyspec.drafting.lean import Interleaved, LeanLayer, Turns, floor, gain, stacked, unit
from polyspec.drafting.medusa import take
from polyspec.errors import ConfigError
from polyspec.laid_out import derived
from polyspec.target import Target
from polyspec.trees import Tree

Attended = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From a block's own keys and values `[S, H, Q, D]` and the layer to all that the block attends to `[S, H, K, D]`."""


class DFlashConfig(HeadConfig):
    """`block` is N: the last committed token and N-1 drafts. bridge, recurrent: see this module's text."""

    model_type = "polyspec_dflash"
    block: int = 8
    bridge: bool = False
    recurrent: int = 0


class BlockLayer(nn.Module):
    """A Llama block whose queries are the drafted block's, and whose keys and values are the context's and its own."""

    def __init__(self, config: DFlashConfig, index: int):
        super().__init__()
        heads, shared = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width, self.index = config.hidden_size, index
        self.dim = config.head_dim or width // heads
        self.q_proj = nn.Linear(width, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(width, shared * self.dim, bias=False)
        self.v_proj = nn.Linear(width, shared * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, width, bias=False)
        self.mlp = LlamaMLP(config)
        self.attention_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.mlp_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """K, V `[S, H, T, D]` of context features or of the block itself `[S, T, d]`."""
        k, v = (p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return apply_rotary_pos_emb(k, k, *rope)[0], v

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, attended: Attended) -> Tensor:
        """`x [S, Q, d]`; mask `[S or 1, 1, Q or 1, K]`, True = visible, None = everything."""
        normed = self.attention_norm(x)
        q = self.q_proj(normed).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q = apply_rotary_pos_emb(q, q, *rope)[0]
        k, v = attended(*self.keys_values(normed, rope), self.index)
        # a group's query heads as more rows of one key-value head, so that the cache is never copied
        groups = q.shape[1] // k.shape[1]
        rows = q.reshape(q.shape[0], k.shape[1], -1, self.dim)
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, groups, 1)
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
        x = x + self.o_proj(out.reshape(q.shape).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Recurrence(nn.Module):
    """What the tokens drafted before a place change there: h_i, e(x_{i-1}), s_{i-1} to h_i + W_o s_i and s_i."""

    def __init__(self, width: int, state: int):
        super().__init__()
        self.hidden = nn.Linear(width, state, bias=False)
        self.token = nn.Linear(width, state, bias=False)
        self.state = nn.Linear(state, state, bias=False)
        self.out = nn.Linear(state, width, bias=False)

    def forward(self, hidden: Tensor, embedded: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """`hidden`, `embedded [.., d_t]` and the state `[.., r]` of the place before, None at the first."""
        total = self.hidden(hidden) + self.token(embedded)
        state = functional.silu(total if state is None else total + self.state(state))
        return hidden + self.out(state), state


class DFlashModel(HeadModel):
    """The block drafter. Width is free; if it is not the target's, two projections join them.

    `for_target(model, layers=…, block=…, target_layers=number or list of hidden-state indices, hidden_size=…)`.
    """

    config_class = DFlashConfig
    config: DFlashConfig
    added = ("recurrence.",)

    def __init__(self, config: DFlashConfig):
        super().__init__(config)
        width, theirs = config.hidden_size, config.target_hidden_size
        self.mask = nn.Embedding(config.block - 1 if config.bridge else 1, width)
        self.bridge = nn.Linear(2 * width, width, bias=False) if config.bridge else None
        self.fuse = nn.Linear(len(config.target_layers or ()) * theirs, width, bias=False)
        self.fuse_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)
        self.widen = nn.Identity() if width == theirs else nn.Linear(width, theirs, bias=False)
        self.narrow = nn.Identity() if width == theirs else nn.Linear(theirs, width, bias=False)
        self.recurrence = Recurrence(theirs, config.recurrent) if config.recurrent else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.bridge is not None and (module is self.fuse or module is self.bridge):
            weight = cast(nn.Linear, module).weight
            start = torch.empty_like(weight).normal_(0.0, 0.02)
            start[:, -len(start) :].diagonal().add_(1)
            initialization.copy_(weight, start)

    @classmethod
    def default_sizes(cls, target: Target, sizes: dict[str, Any]) -> dict[str, Any]:
        sizes = {"num_hidden_layers": sizes.pop("layers", 1), **sizes}
        if sizes.get("block", 8) < 2:
            raise ConfigError(f"block must be ≥ 2 (the last committed token and a draft), got {sizes['block']}")
        if sizes.get("recurrent", 0) < 0:
            raise ConfigError(f"recurrent must be ≥ 0, the width of a state, got {sizes['recurrent']}")
        chosen = sizes.pop("target_layers", 5)
        depth = target.config.num_hidden_layers
        layers = spread_layers(depth, chosen) if isinstance(chosen, int) else list(chosen)
        if isinstance(chosen, int) and sizes.get("bridge"):
            layers[-1] = depth
        if not layers or not all(0 <= i <= depth for i in layers):
            raise ConfigError(f"target_layers must name hidden states 0 … {depth} of the target, got {layers}")
        return {**super().default_sizes(target, sizes), "target_layers": layers}

    def context(self, hidden: tuple[Tensor, ...]) -> Tensor:
        """c_t `[S, T, d]` of committed tokens from the target's hidden states `[S, T, d_t]`, one tensor a layer."""
        # deep layers can be a hundred times the shallow ones, with outliers beyond that: one scale for all
        even = torch.cat([functional.rms_norm(h, h.shape[-1:]) for h in hidden], dim=-1)
        return self.fuse_norm(self.fuse(even))

    def keys_values(self, context: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """K, V `[S, H, T, D]` of every layer for committed tokens `[S, T, d]` at `positions [S or 1, T]`."""
        rope = self.rotary(context, positions)
        return [layer.keys_values(context, rope) for layer in self.layers]  # type: ignore[operator]

    def queries(self, embedded: Tensor, last: Tensor) -> Tensor:
        """The blocks' inputs `[.., N, d]` from e(x_0) `[.., d_t]` and c of the token before it `[.., d]`."""
        first = self.narrow(embedded).unsqueeze(-2)
        masks = self.mask.weight.to(first.dtype).expand(*first.shape[:-2], self.config.block - 1, -1)
        x = torch.cat([first, masks], dim=-2)
        if self.bridge is None:
            return x
        return x + self.bridge(torch.cat([first.squeeze(-2), last], dim=-1)).unsqueeze(-2)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, attended: Attended) -> Tensor:
        """Blocks `x [S, Q, d]` at `positions [S, Q]` to what the target's output layer reads, `[S, Q, d_t]`."""
        rope = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, rope, mask, attended)
        return self.widen(self.norm(x))

    def along(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """What the output layer reads at places 1 … n of blocks, from the outputs `hidden [.., n, d_t]` of the parallel
        pass and the tokens before each place, `embedded [.., n, d_t]`."""
        if self.recurrence is None:
            return hidden
        state, found = None, []
        for h, e in zip(hidden.unbind(-2), embedded.unbind(-2), strict=True):
            out, state = self.recurrence(h, e, state)
            found.append(out)
        return torch.stack(found, dim=-2)


def spread_layers(depth: int, count: int) -> list[int]:
    """`count` hidden states from the output of a target's second layer to that of its third last (fewer if it is
    shallow): `round(2 + i (depth - 4) / (count - 1))`."""
    if count < 1:
        raise ConfigError(f"target_layers must be ≥ 1, got {count}")
    low, high = min(2, depth), max(depth - 2, min(2, depth))
    if count == 1:
        return [high]
    return sorted({round(low + i * (high - low) / (count - 1)) for i in range(count)})


class LeanRecurrence:
    """A Recurrence made ready for drafting; W_h h_i of all places is computed at once."""

    def __init__(self, model: Recurrence):
        self.hidden, self.token, self.state, self.out = (
            stacked([p]) for p in (model.hidden, model.token, model.state, model.out)
        )

    def __call__(self, hidden: Tensor, embedded: Tensor, state: Tensor | None) -> Tensor:
        """s_i from W_h h_i, e(x_{i-1}) and s_{i-1}."""
        total = hidden + self.token(embedded)
        return functional.silu(total if state is None else total + self.state(state))


class LeanDFlash:
    """A DFlashModel made ready for drafting: what its methods of the same names give, but for rounding."""

    def __init__(self, model: DFlashModel):
        config, fuse, layers = model.config, model.fuse.weight, [cast(BlockLayer, layer) for layer in model.layers]
        device, self.dtype, self.masks = fuse.device, fuse.dtype, config.block - 1
        count = len(config.target_layers or ())
        theirs, ours = fuse.shape[1] // count, fuse.shape[0]
        self.fuse = stacked([model.fuse], torch.full((fuse.shape[1],), theirs**0.5, device=device))
        self.fuse_gain, self.gain = gain(model.fuse_norm), gain(model.norm)
        self.even = floor(theirs, torch.finfo(torch.float32).eps, device)
        self.floor = floor(ours, config.rms_norm_eps, device)
        self.layers = [
            LeanLayer(layer, layer.mlp, (layer.attention_norm, layer.mlp_norm), config, i)
            for i, layer in enumerate(layers)
        ]
        self.known = stacked([p for layer in layers for p in (Interleaved(layer.k_proj, layer.dim), layer.v_proj)])
        self.mask = model.mask.weight.detach().float()
        self.bridge = None if model.bridge is None else stacked([model.bridge])
        self.narrow, self.widen = (stacked([p]) if isinstance(p, nn.Linear) else p for p in (model.narrow, model.widen))
        self.turns = Turns(config, device)
        self.recurrence = None if model.recurrence is None else LeanRecurrence(model.recurrence)

    def context(self, hidden: tuple[Tensor, ...]) -> Tensor:
        even = torch.cat([unit(h.float(), self.even) for h in hidden], dim=-1)
        return (unit(self.fuse(even.to(self.dtype)).float(), self.floor) * self.fuse_gain).to(self.dtype)

    def remember(self, context: Tensor, cache: RaggedCache) -> None:
        """Keys and values of committed tokens' `context [S, T, d]` into every layer of `cache`."""
        turns = self.turns.behind(cache, context.shape[1])
        for layer, part in zip(self.layers, self.known(context).chunk(len(self.layers), dim=-1), strict=True):
            keys, values = part.chunk(2, dim=-1)
            cache.update(layer.heads_of(keys, turns), layer.values_of(values), layer.index)

    def queries(self, embedded: Tensor, last: Tensor) -> Tensor:
        first = self.narrow(embedded)
        x = torch.cat([first[:, None].float(), self.mask.expand(len(first), self.masks, -1)], dim=1)
        return x if self.bridge is None else x + self.bridge(torch.cat([first, last], dim=-1))[:, None]

    def __call__(self, x: Tensor, mask: Tensor | None, cache: RaggedCache) -> Tensor:
        turns = self.turns.behind(cache, x.shape[1])
        for layer in self.layers:
            x = layer(x, turns, mask, cache)
        return self.widen((unit(x, self.floor) * self.gain).to(self.dtype))


class DFlash(HeadDrafter[DFlashModel]):
    """Drafts at most `block - 1` tokens in one pass of `heads`, a DFlashModel or its folder."""

    kind = DFlashModel

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.bind(context)
        self.lean = derived(self.model, "lean", lambda: LeanDFlash(self.model))
        recurrence, config = self.model.recurrence, self.model.config
        small = 2 * config.recurrent <= config.target_hidden_size
        self.answer = self.layers.behind(recurrence.out) if recurrence is not None and small else None  # W_U W_o
        lengths = self.target.cache_lengths
        self.cache = RaggedCache(len(lengths), context.sequences.limit + self.model.config.block)
        self.keep_prompt(hidden)

    def remember(self, hidden: tuple[Tensor, ...], lengths: list[int]) -> None:
        """Put hidden states `[S, T, d_t]` behind each row's tokens, and keep as many as the target kept."""
        before, context = self.cache.lengths, self.lean.context(hidden)
        self.lean.remember(context, self.cache)
        self.cache.rollback(lengths)
        kept = [new - old for new, old in zip(self.cache.lengths, before, strict=True)]
        # nothing is known before a first token
        self.last = take(functional.pad(context, (0, 0, 1, 0)), torch.tensor(kept, device=context.device))

    def positions(self, width: int) -> Tensor:
        """Of the `width` tokens behind each stream's kept ones `[S, width]`."""
        start = torch.tensor(self.cache.lengths, device=self.target.device)[:, None]
        return start + torch.arange(width, device=self.target.device)

    @property
    def in_turn(self) -> bool:  # type: ignore[override]
        return self.model.recurrence is not None

    @property
    def reach(self) -> int:
        return self.model.config.block - 1

    def places(self) -> Tensor:
        """What the parallel pass gives for the places of each stream's next block, `[S, N-1, d_t]`."""
        self.catch_up()
        pending = self.streams(self.sequences.tail(1)[:, 0])
        block = self.lean.queries(self.layers.embed(pending), self.last)
        mask, width = None, block.shape[1]
        if not self.cache.uniform:
            slots = torch.arange(self.cache.longest + width, device=block.device)
            mask = (slots <= self.positions(width)[:, -1:])[:, None, None, :]
        self.context.stats.draft_calls += 1
        return self.lean(block, mask, self.cache)[:, 1:]

    def block(self, count: int) -> Tensor:
        """Logits `[B, n, V]` of the next n ≤ `count` positions, for a model whose places are independent."""
        return self.logits(self.places()[:, :count])

    def propose(self, count: int) -> Draft:
        if not self.in_turn:
            return self.draw(self.block(count))
        self.prepare(self.places()[:, :count])
        state = None

        def predict(i: int, token: Tensor) -> Tensor:
            nonlocal state
            logits, state = self.follow(i, token, state)
            return logits

        return self.draw_in_turn(self.prepared.shape[1], predict)

    def prepare(self, places: Tensor) -> None:
        """Compute at once what places `[S, n, d_t]` have by themselves: h_i, W_h h_i and, if that helps, W_U h_i."""
        assert self.lean.recurrence is not None
        self.prepared, self.known = places, self.lean.recurrence.hidden(places)
        self.own = None if self.answer is None else self.layers.logits(places)

    def follow(self, place: int, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits `[B, W, V]` at a prepared place behind `tokens [B, W]`, and states `[S, W, r]` from those before it."""
        assert self.lean.recurrence is not None
        at = slice(place, place + 1)
        state = self.lean.recurrence(self.known[:, at], self.layers.embed(self.streams(tokens)), state)
        if self.answer is None or self.own is None:
            return self.logits(self.prepared[:, at] + self.lean.recurrence.out(state)), state
        return self.guided(self.own[:, at] + self.answer(state)), state

    def root(self) -> Tensor:
        self.prepare(self.places())
        logits, self.states = self.follow(0, self.sequences.tail(1), None)
        return logits

    def level(self, tokens: Tensor, tree: Tree) -> Tensor:
        above = self.streams(tree.parents[:, -tokens.shape[1] :] + 1)
        state = self.states.gather(1, above[..., None].expand(-1, -1, self.states.shape[-1]))
        logits, state = self.follow(tree.height, tokens, state)
        self.states = torch.cat([self.states, state], dim=1)
        return logits

    def rollback(self) -> None:
        pass  # a block never enters the cache for good
