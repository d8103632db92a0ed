"""A catalogue: items, their token tuples, and which of them a request may be answered with.

It is one file, `items.safetensors`, beside the model: `ids [I]` and `tokens [I, D]`, int64; titles, the tokens that every
prompt begins with, and a checksum are in its metadata. Several items may share a tuple: a list then holds them one after
another, with equal scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from polyspec.errors import CheckpointError, InputError
from polyspec.files import whole_file
from polyspec.outputs import Recommendation
from polyspec.trie import Trie, as_table

FILE = "items.safetensors"
FORMAT = "polyspec items 1"


class Items:
    """I items with ids of the user's choice. It never changes; `with_items` and `without` make another.

    ids: whole numbers, each once. tokens `[I, D]`: an item's token ids in the model's vocabulary. titles: one an item.
    prefix: token ids before every history, "begin of sequence" say. max_history: items of a history to use, the latest.
    Raises InputError for what does not fit together.
    """

    def __init__(
        self,
        ids: Sequence[int],
        tokens: ArrayLike,
        titles: Sequence[str] | None = None,
        prefix: Sequence[int] = (),
        max_history: int | None = None,
    ):
        self.ids = [int(i) for i in ids]
        self.tokens = as_table(tokens)
        self.titles = None if titles is None else [str(t) for t in titles]
        self.prefix, self.max_history = [int(t) for t in prefix], max_history
        self.trie = Trie.build(self.tokens)
        self.index = {item: index for index, item in enumerate(self.ids)}
        if not len(self.ids) == len(self.tokens) == len(self.titles or self.ids):
            raise InputError(
                f"{len(self.ids)} item ids, {len(self.tokens)} token tuples"
                + (f" and {len(self.titles)} titles" if self.titles is not None else "")
                + " do not match; give one of each an item"
            )
        if len(self.index) < len(self.ids):
            double = next(i for n, i in enumerate(self.ids) if self.index[i] != n)
            raise InputError(f"item id {double} occurs more than once")
        if (max_history is not None and max_history < 1) or min(self.prefix, default=0) < 0:
            raise InputError(f"max_history must be ≥ 1 and prefix tokens ≥ 0; got {max_history} and {self.prefix}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def highest_token(self) -> int:
        """The highest token id that a prompt or an item may hold."""
        return max(int(self.tokens.max()), *self.prefix, 0)

    @cached_property
    def sharing(self) -> dict[int, list[int]]:
        """The items (indices) that end in each leaf of the trie."""
        found: dict[int, list[int]] = {}
        for index, leaf in enumerate(self.trie.leaf.tolist()):
            found.setdefault(leaf, []).append(index)
        return found

    # -- requests ----------------------------------------------------------------------------------------------------

    def find(self, items: Collection[int], what: str) -> list[int]:
        """Indices of item ids; InputError naming those that are unknown."""
        wrong = [i for i in items if isinstance(i, bool) or not isinstance(i, int | np.integer)]
        if wrong:
            raise InputError(f"{what} must hold item ids, whole numbers; got {wrong[0]!r}")
        unknown = [int(i) for i in items if i not in self.index]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise InputError(f"{what} holds item ids that are not known: {', '.join(map(str, unknown[:3]))}{more}")
        return [self.index[int(i)] for i in items]

    def prompt(self, history: Collection[int], room: int) -> list[int]:
        """The tokens of a history, oldest first, cut to its latest items so that they fit into `room` tokens.
        InputError for an empty history or unknown items."""
        indices = self.find(history, "the history")
        if not indices:
            raise InputError("the history is empty; give at least one item id")
        most = (room - len(self.prefix)) // self.tokens.shape[1]
        if self.max_history is not None:
            most = min(most, self.max_history)
        if most < 1:
            raise InputError(f"the model's context has no room for an item of {self.tokens.shape[1]} tokens")
        return [*self.prefix, *self.tokens[indices[-most:]].ravel().tolist()]

    def allowed(self, allow: Collection[int] | None, deny: Collection[int] | None) -> np.ndarray | None:
        """Which items a row may be answered with, `[I]` bool; None for all. InputError for unknown items, or none left."""
        if allow is None and not deny:
            return None
        mask = np.full(len(self), allow is None)
        if allow is not None:
            mask[self.find(allow, "allow")] = True
        mask[self.find(deny or (), "deny")] = False
        if not mask.any():
            raise InputError("allow and deny leave no item to recommend; allow more or deny fewer")
        return mask

    def recommendations(
        self, leaves: Sequence[int], scores: Sequence[float], allowed: np.ndarray | None, k: int
    ) -> list[Recommendation]:
        """At most k items from leaves of the trie (0: none), best first."""
        found = [
            Recommendation(self.ids[i], None if self.titles is None else self.titles[i], score)
            for leaf, score in zip(leaves, scores, strict=True)
            if leaf
            for i in self.sharing[leaf]
            if allowed is None or allowed[i]
        ]
        return found[:k]

    # -- changes -----------------------------------------------------------------------------------------------------

    def with_items(self, ids: Sequence[int], tokens: ArrayLike, titles: Sequence[str] | None = None) -> Items:
        """A catalogue with these items as well. InputError for ids that are there, or tuples of another length."""
        tokens = as_table(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.tokens.shape[1]:
            raise InputError(f"items here have {self.tokens.shape[1]} tokens each; got {list(tokens.shape)}")
        both = None if self.titles is None else [*self.titles, *(titles or [""] * len(ids))]
        return Items([*self.ids, *ids], np.concatenate([self.tokens, tokens]), both, self.prefix, self.max_history)

    def without(self, ids: Collection[int]) -> Items:
        """A catalogue without these items. InputError for unknown ids, or if none would be left."""
        gone = set(self.find(ids, "the items to remove"))
        keep = [i for i in range(len(self)) if i not in gone]
        if not keep:
            raise InputError("no item would be left")
        titles = None if self.titles is None else [self.titles[i] for i in keep]
        return Items([self.ids[i] for i in keep], self.tokens[keep], titles, self.prefix, self.max_history)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write `items.safetensors` into `folder`; returns its path."""
        path = Path(folder) / FILE
        arrays = {"ids": np.asarray(self.ids, np.int64), "tokens": self.tokens.astype(np.int64)}
        said = {"titles": self.titles, "prefix": self.prefix, "max_history": self.max_history}
        described = json.dumps(said, ensure_ascii=False, sort_keys=True)
        metadata = {"format": FORMAT, "items": described, "sha256": checksum(arrays, described)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                save_file(arrays, temporary, metadata)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    @classmethod
    def load(cls, source: str | Path) -> Items:
        """The catalogue in a folder, or a file of one. CheckpointError if it is missing, damaged or something else."""
        path = Path(source) / FILE if Path(source).is_dir() else Path(source)
        if not path.is_file():
            raise CheckpointError(f"{source} is no folder with a catalogue, {FILE}; write one there with Items.save")
        try:
            with safe_open(path, "numpy") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                arrays = {name: file.get_tensor(name) for name in ("ids", "tokens") if name in names}
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); write it again") from error
        if metadata.get("format") != FORMAT or len(arrays) < 2 or "items" not in metadata:
            raise CheckpointError(f"{path} holds no catalogue ({FORMAT}); write it with Items.save")
        if checksum(arrays, metadata["items"]) != metadata.get("sha256"):
            raise CheckpointError(f"{path} is damaged: its checksum does not match; write it again")
        try:
            return cls(arrays["ids"].tolist(), arrays["tokens"], **json.loads(metadata["items"]))
        except (InputError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} holds no valid catalogue: {error}") from error


def checksum(arrays: dict[str, np.ndarray], described: str) -> str:
    digest = hashlib.sha256(described.encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name], np.int64).tobytes())
    return digest.hexdigest()


def masks(rows: Sequence[np.ndarray | None], items: int, device: torch.device) -> Tensor | None:
    """The rows' masks `[B, I]` bool on `device`, None if every row may have every item."""
    if all(row is None for row in rows):
        return None
    return torch.from_numpy(np.stack([np.ones(items, bool) if row is None else row for row in rows])).to(device)
