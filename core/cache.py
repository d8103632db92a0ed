"""A key-value cache whose rows have lengths of their own.

Row b's token at position i always sits in slot i of row b, whatever the other rows do. Keeping some drafted tokens and
dropping the rest is therefore a change of one integer per row: nothing is copied, nothing is masked out, and the
stale slots are overwritten by the next forward pass. Padding never enters the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from polyspec.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from polyspec.trees import Tree

GROWTH = 256  # slots added at least when a buffer is too small


class RaggedLayer(CacheLayerMixin):
    """One attention layer's buffers, keys and values `[S, H, capacity, D]`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: RaggedCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        streams, heads = key_states.shape[:2]
        shape = (streams, heads, self.cache.capacity)
        # zeros, not empty: a masked slot still enters the product with the value matrix, and 0 * nan is nan
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write `[S, H, T, D]` behind each row's kept tokens; return views over all slots in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        new = key_states.shape[-2]
        end = self.cache.longest + new
        if end > self.keys.shape[-2]:
            self.keys, self.values = grow(self.keys, end), grow(self.values, end)
        if self.cache.uniform:
            self.keys[:, :, end - new : end] = key_states
            self.values[:, :, end - new : end] = value_states
        else:
            rows, slots = self.cache.slots(new, key_states.device)
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.cache.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.longest + query_length, 0

    def get_max_length(self) -> int:
        return -1


def grow(buffer: Tensor, needed: int) -> Tensor:
    """A copy of `buffer [S, H, C, D]` with room for at least `needed` slots."""
    streams, heads, capacity, dim = buffer.shape
    larger = buffer.new_zeros((streams, heads, max(needed, capacity + max(GROWTH, capacity // 2)), dim))
    larger[:, :, :capacity] = buffer
    return larger


@dataclass(frozen=True, slots=True)
class Layout:
    """Where T tokens about to be written sit and what they see, for S rows or for one that stands for all.

    base `[S or 1, 1]`: tokens before the chain or before the tree's root; depth `[.., T]`: of the new tokens, their
    position is `base + depth`; key_depth `[.., K]`: of what every slot holds, negative before the root; visible
    `[.., T, K]` bool.
    """

    base: Tensor
    depth: Tensor
    key_depth: Tensor
    visible: Tensor


class RaggedCache(Cache):
    """Drop-in `past_key_values` for any attention model, with one length per row.

    `lengths[s]` is the number of tokens kept in row s, on the host. `capacity` (slots) is allocated at the first
    forward and grows when it must, so give the final length if it is known.

    Rows that need no more forward passes can be dropped: then `lengths` and the buffers have only the rows `present`
    (their numbers as they were first counted; None: all), while `rollback` goes on taking a length for every row.
    """

    layers: Any  # list[RaggedLayer]; transformers' own annotation is a union of everything a cache may hold

    def __init__(self, streams: int, capacity: int):
        super().__init__(layers=[])
        self.layer_class_to_replicate = lambda: RaggedLayer(self)  # type: ignore[assignment]
        self.capacity = max(int(capacity), 1)
        self._index: tuple[tuple[int, ...], int, Tensor, Tensor] | None = None
        self.present: Tensor | None = None
        self.numbers = list(range(streams))
        self.rollback([0] * streams)

    def rollback(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths[s]` tokens of each row. Also how tokens just written are accepted."""
        self.all_lengths = list(lengths)
        self.lengths = self.all_lengths if self.present is None else [self.all_lengths[n] for n in self.numbers]
        self.longest = max(self.lengths)
        self.uniform = min(self.lengths) == self.longest

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's `[S, H, T, D]` behind each row's kept tokens; return views over all slots in use."""
        while len(self.layers) <= layer_idx:
            self.layers.append(RaggedLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def slots(self, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row `[S, 1]` and slot `[S, new]` indices of the next `new` tokens; made once a forward, not once a layer."""
        key = (tuple(self.lengths), new)
        if self._index is None or self._index[:2] != key or self._index[2].device != device:
            start = torch.tensor(self.lengths, device=device)[:, None]
            rows = torch.arange(len(self.lengths), device=device)[:, None]
            self._index = (*key, rows, start + torch.arange(new, device=device))
        return self._index[2], self._index[3]

    def layout(self, new: int, tree: Tree | None, device: torch.device) -> Layout:
        """Of the next `new` tokens: a chain, or the last `new` nodes of `tree` (its root counted), whose earlier ones are
        the last tokens in the cache. A node sees what comes before the root, its ancestors and itself."""
        size = new if tree is None else tree.size + 1
        lengths = self.lengths[:1] if self.uniform else self.lengths
        base = torch.tensor(lengths, device=device)[:, None] - (size - new)
        relative = torch.arange(self.longest + new, device=device)[None] - base
        if tree is None:
            depth = torch.arange(new, device=device)[None]
            return Layout(base, depth, relative, relative[:, None, :] <= depth[:, :, None])
        depth = tree.depth.to(device).view(-1, size)
        ancestors = tree.ancestors.to(device).view(-1, size, size)[:, size - new :]
        if ancestors.shape[0] not in (1, len(self.lengths)):  # guidance: both streams hold the same tree
            ancestors, depth = torch.cat([ancestors] * 2), torch.cat([depth] * 2)
        rows = max(ancestors.shape[0], relative.shape[0])
        relative, index = relative.expand(rows, -1), relative.clamp(0, size - 1).expand(rows, -1)
        among = ancestors.expand(rows, -1, -1).gather(2, index[:, None, :].expand(-1, new, -1))
        inside = ((relative >= 0) & (relative < size))[:, None, :]
        visible = torch.where(inside, among, (relative < 0)[:, None, :])
        depth = depth.expand(rows, -1)
        key_depth = torch.where(relative < 0, relative, depth.gather(1, index))
        return Layout(base, depth[:, size - new :], key_depth, visible)

    def keep_path(self, path: Tensor) -> None:
        """Move the tree nodes `path [S, D]` (offsets from each row's length) to the D slots behind the kept tokens.

        Call before `rollback`. Only D slots a row are copied; offsets beyond a row's accepted nodes may be arbitrary.
        """
        rows, target = self.slots(path.shape[1], path.device)
        source = target[:, :1] + path
        for layer in self.layers:
            layer.keys[rows, :, target] = layer.keys[rows, :, source]
            layer.values[rows, :, target] = layer.values[rows, :, source]

    def select_rows(self, rows: Tensor, host_rows: Sequence[int]) -> None:
        """Keep only the given rows (a copy of what stays), which are the cache's rows from now on."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.present, self.numbers = None, list(range(len(host_rows)))
        self.rollback([self.lengths[r] for r in host_rows])

    def drop(self, going: Sequence[bool]) -> Tensor | None:
        """Let go of rows that are not `going [S]`, if they are an eighth of those present: the copy costs about what a
        few forward passes save. Returns which of the rows present stay, None if all do."""
        stay = [i for i, n in enumerate(self.numbers) if going[n]]
        if not stay or 8 * len(stay) > 7 * len(self.numbers):
            return None
        device = self.layers[0].keys.device if self.layers else None
        index = torch.tensor(stay, device=device)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.numbers = [self.numbers[i] for i in stay]
        self.present = torch.tensor(self.numbers, device=device)
        self.rollback(self.all_lengths)
        return index

    def padded(self, pads: Sequence[int]) -> DynamicCache:
        """The first `len(pads)` rows as a transformers cache to continue from, row s behind `pads[s]` slots of padding."""
        other, width = DynamicCache(), max(p + n for p, n in zip(pads, self.lengths, strict=False))
        for index, layer in enumerate(self.layers):
            start = torch.tensor(pads, device=layer.keys.device)[:, None]
            slots = (torch.arange(width, device=layer.keys.device) - start).clamp(0, layer.keys.shape[-2] - 1)
            keys, values = (
                x[: len(pads)].gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
                for x in (layer.keys, layer.values)
            )
            other.update(keys, values, index)
        return other

    def adopt(self, other: Cache, slots: Tensor, lengths: Sequence[int]) -> None:
        """Take over a filled transformers cache: row s's kept tokens are its slots `slots [S, P]`, first `lengths[s]`.

        Raises UnsupportedModelError for layers that no longer hold every token (sliding windows, quantised, recurrent).
        """
        width = slots.shape[1]
        for index, entry in enumerate(other.layers):
            theirs: Any = entry
            keys = getattr(theirs, "keys", None)
            if getattr(theirs, "is_sliding", False) or not isinstance(keys, Tensor) or keys.ndim != 4:
                raise UnsupportedModelError(
                    f"layer {index} of the given past_key_values ({type(theirs).__name__}) does not hold every past "
                    "token, so drafted tokens could not be rolled back; leave past_key_values out"
                )
            if keys.shape[0] != slots.shape[0]:
                raise InputError(f"past_key_values has {keys.shape[0]} rows, the prompt {slots.shape[0]}")
            layer = RaggedLayer(self)
            layer.lazy_initialization(keys, theirs.values)
            assert layer.keys is not None and layer.values is not None
            if width > layer.keys.shape[-2]:
                layer.keys, layer.values = grow(layer.keys, width), grow(layer.values, width)
            index_k = slots[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            index_v = slots[:, None, :, None].expand(-1, keys.shape[1], -1, theirs.values.shape[3])
            layer.keys[:, :, :width] = keys.gather(2, index_k)
            layer.values[:, :, :width] = theirs.values.gather(2, index_v)
            self.layers.append(layer)
        self.rollback(lengths)
