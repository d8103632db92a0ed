"""A set of token sequences of one length as a prefix tree in flat tables, for constrained decoding on the device.

After the CSR transition table of STATIC, 2602.22647: the children of a node have consecutive ids, so "what may follow" is
one gather over a first id and a count, for all beams of all rows at once; no dictionary is walked and nothing leaves the
device. Node 0 is the root; a node's id names its prefix. Any subset of the sequences can be allowed per row by a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from polyspec.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """n nodes over I sequences of D tokens. The tensors share a device.

    token, parent, first, count `[n]` long: the token that leads to a node (0 for the root), the node above (the root is
    above itself), its first child's id, and how many children it has. path `[I, D]` long: the nodes along each sequence;
    equal sequences end in one node. widths: the most children of a node at depth 0 … D-1.
    """

    token: Tensor
    parent: Tensor
    first: Tensor
    count: Tensor
    path: Tensor
    widths: tuple[int, ...]

    @classmethod
    def build(cls, sequences: ArrayLike) -> Trie:
        """The trie of `sequences [I, D]`, whole numbers ≥ 0, on the CPU. InputError for any other shape or content."""
        rows = as_table(sequences)
        if rows.ndim != 2 or 0 in rows.shape or not np.issubdtype(rows.dtype, np.integer):
            raise InputError(
                f"a trie needs whole numbers [sequences, length], neither empty; got {rows.dtype} {list(rows.shape)}"
            )
        if int(rows.min()) < 0:
            raise InputError(f"a trie needs token ids ≥ 0; got {int(rows.min())}")
        order = np.lexsort(rows.T[::-1])
        ordered = rows[order].astype(np.int64)
        changed = np.ones(len(rows), dtype=bool)
        changed[1:] = False
        token, parent, path, widths, above, nodes = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [], [], None, 1
        for depth in range(rows.shape[1]):
            changed[1:] |= ordered[1:, depth] != ordered[:-1, depth]
            here = nodes + np.cumsum(changed) - 1
            token.append(ordered[changed, depth])
            parent.append(np.zeros(int(changed.sum()), np.int64) if above is None else above[changed])
            widths.append(int(np.bincount(parent[-1]).max()))
            unsorted = np.empty_like(here)
            unsorted[order] = here
            path.append(unsorted)
            above, nodes = here, nodes + len(token[-1])
        parents = np.concatenate(parent)
        count = np.bincount(parents[1:], minlength=nodes)
        first = np.searchsorted(parents[1:], np.arange(nodes)) + 1  # ids grow level by level, parent by parent

        def table(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

        nodes_of = table(np.stack(path, axis=1))
        first = np.where(count > 0, first, 0)
        return cls(table(np.concatenate(token)), table(parents), table(first), table(count), nodes_of, tuple(widths))

    @property
    def depth(self) -> int:
        """D, the length of every sequence."""
        return len(self.widths)

    @property
    def leaf(self) -> Tensor:
        """The node `[I]` in which each sequence ends."""
        return self.path[:, -1]

    def to(self, device: torch.device | str) -> Trie:
        """The same trie on another device."""
        return replace(
            self,
            token=self.token.to(device),
            parent=self.parent.to(device),
            first=self.first.to(device),
            count=self.count.to(device),
            path=self.path.to(device),
        )

    def alive(self, allowed: Tensor) -> Tensor:
        """Which nodes lead to an allowed sequence, `[B, n]` bool, from `allowed [B, I]` bool."""
        found = torch.zeros(len(allowed), len(self.token), dtype=torch.bool, device=allowed.device)
        for level in self.path.unbind(1):
            leads = torch.zeros_like(found, dtype=torch.int32)
            found |= leads.scatter_add_(1, level.expand_as(allowed), allowed.int()) > 0
        found[:, 0] = allowed.any(1)
        return found

    def children(self, node: Tensor, width: int, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids `[B, W, width]` of what follows `node [B, W]`, and which of them exist. alive: `[B, n]`, from `alive`;
        width: the most children there may be. Ids that do not exist are 0."""
        offset = torch.arange(width, device=node.device)
        exists = offset < self.count[node].unsqueeze(-1)
        child = torch.where(exists, self.first[node].unsqueeze(-1) + offset, 0)
        if alive is not None:
            exists &= alive.gather(1, child.flatten(1)).view(child.shape)
        return child, exists


def as_table(sequences: ArrayLike) -> np.ndarray:
    """`sequences` as an array; InputError if they differ in length."""
    try:
        return np.asarray(sequences)
    except ValueError as error:
        raise InputError(f"token sequences must all have one length ({error})") from error
