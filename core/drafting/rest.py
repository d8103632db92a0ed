"""Drafts what most often followed the current context in a collection of texts.

REST: Retrieval-Based Speculative Decoding, 2311.08252, §3. The longest suffix of the row (at most `longest` tokens)
that occurs in the datastore is looked up in a suffix array; what followed its occurrences forms a trie weighted by
counts, and its most frequent nodes are drafted as a tree. Exact: nodes are certain, and the target's own draw at each
node picks the child. Runs on the host, on tokens that the loop has brought there anyway.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from polyspec.decoding.sequences import Sequences
from polyspec.drafting.base import Context, Draft
from polyspec.errors import CheckpointError, ConfigError, InputError
from polyspec.lengths import positive
from polyspec.target import Target
from polyspec.trees import Tree

END = np.iinfo(np.uint32).max  # stands between texts; no token has this id
SORTED = 64  # suffixes are in order as far as this many tokens
OCCURRENCES = 5000  # the most that are counted for one suffix


class Datastore:
    """Token sequences and the order of their suffixes. Make it with `from_tokens` or `from_texts`; `save` keeps it."""

    def __init__(self, tokens: np.ndarray, order: np.ndarray):
        self.tokens, self.order = tokens, order
        # big-endian bytes compare as the tokens do, so that a binary search compares in C
        self.bytes = tokens.astype(">u4").tobytes()

    @classmethod
    def from_tokens(cls, texts: Sequence[Sequence[int]]) -> Datastore:
        """Index token lists. Raises InputError if there is nothing in them."""
        parts = [part for text in texts if len(text) for part in (np.asarray(text, dtype=np.uint32), [END])]
        if not parts:
            raise InputError("the datastore is empty: give at least one text")
        tokens = np.concatenate(parts).astype(np.uint32)
        return cls(tokens, suffix_order(tokens))

    @classmethod
    def from_texts(cls, texts: Sequence[str], tokenizer: Any) -> Datastore:
        """Index texts through the target's tokenizer."""
        return cls.from_tokens([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file."""
        save_file({"tokens": self.tokens, "order": self.order}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Datastore:
        """Read what `save` wrote. Raises CheckpointError if it is missing or damaged."""
        try:
            stored = load_file(path)
            return cls(stored["tokens"], stored["order"])
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"cannot read the datastore {path} ({error}); Datastore.save writes it") from error

    def __len__(self) -> int:
        return len(self.tokens)

    def occurrences(self, pattern: Sequence[int]) -> np.ndarray:
        """Where `pattern` ends in the datastore, `[m]`."""
        key = np.asarray(pattern, dtype=">u4").tobytes()

        def start(suffix: np.integer) -> bytes:
            return self.bytes[4 * int(suffix) : 4 * int(suffix) + len(key)]

        low = bisect_left(self.order, key, key=start)
        return self.order[low : bisect_right(self.order, key, lo=low, key=start)] + len(pattern)

    def continuations(self, context: Sequence[int], count: int, longest: int, shortest: int) -> np.ndarray:
        """`[m, count]`: what followed the longest suffix of `context` that occurs at all, END behind a text's end."""
        for length in range(min(longest, len(context)), shortest - 1, -1):
            ends = self.occurrences(context[-length:])
            ends = ends[self.tokens[ends] != END]
            if len(ends):
                ends = ends[:: -(-len(ends) // OCCURRENCES)]
                index = ends[:, None] + np.arange(count)
                found = self.tokens[np.minimum(index, len(self.tokens) - 1)]
                return np.where(np.logical_or.accumulate(found == END, axis=1), END, found)
        return np.empty((0, count), dtype=np.uint32)


def suffix_order(tokens: np.ndarray) -> np.ndarray:
    """The suffixes of `tokens [n]` in the order of their first SORTED tokens, by doubling (Manber & Myers)."""
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    width = 1
    while width < SORTED and rank.max() + 1 < len(rank):
        behind = np.zeros_like(rank)
        behind[:-width] = rank[width:] + 1
        rank = np.unique(rank * (len(rank) + 1) + behind, return_inverse=True)[1]
        width *= 2
    return np.argsort(rank, kind="stable")


def trie(continuations: np.ndarray, nodes: int) -> tuple[list[int], list[int]]:
    """The `nodes` most frequent nodes of the trie of `continuations [m, N]`, shallower ones first where counts are equal:
    their tokens, and each one's parent (-1: the root), which comes before it."""
    tokens, counts, parents = ([np.empty(0, dtype=np.int64)] for _ in range(3))
    node, before = np.full(len(continuations), -1, dtype=np.int64), 0
    for column in range(continuations.shape[1]):
        inside = continuations[:, column] != END
        continuations, node = continuations[inside], node[inside]
        key = (node + 1 << 32) + continuations[:, column]
        children, which, count = np.unique(key, return_inverse=True, return_counts=True)
        tokens.append(children & 0xFFFFFFFF)
        parents.append((children >> 32) - 1)
        counts.append(count)
        node, before = before + which, before + len(children)
    token, count, parent = (np.concatenate(part) for part in (tokens, counts, parents))
    # no node is more frequent than its parent, so that the best ones hang together
    best = np.sort(np.argsort(-count, kind="stable")[:nodes])
    place = np.full(len(token) + 1, -1)
    place[best] = np.arange(len(best))
    return token[best].tolist(), place[parent[best]].tolist()


@cache
def _load(path: str, _changed: float) -> Datastore:
    return Datastore.load(path)


class Rest:
    """Retrieval from `datastore`: a Datastore, the file of one, or token lists.

    nodes: the size of the tree that is drafted. longest, shortest: how many tokens of context are matched. Where no row
    has a match, nothing is drafted.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(
        self,
        datastore: Datastore | str | PathLike[str] | Sequence[Sequence[int]],
        nodes: int = 16,
        longest: int = 16,
        shortest: int = 2,
    ):
        self.nodes = positive("nodes", nodes)
        self.longest, self.shortest = positive("longest", longest), positive("shortest", shortest)
        if self.longest > SORTED or self.shortest > self.longest:
            raise ConfigError(f"need shortest ≤ longest ≤ {SORTED}, got {shortest} and {longest}")
        if isinstance(datastore, str | PathLike):
            path = Path(datastore)
            datastore = _load(str(path), path.stat().st_mtime if path.exists() else 0.0)
        elif not isinstance(datastore, Datastore):
            if any(isinstance(text, str) for text in datastore):
                raise InputError("the datastore holds strings; index them with Datastore.from_texts(texts, tokenizer)")
            datastore = Datastore.from_tokens(datastore)
        self.datastore = datastore

    def check(self, target: Target) -> None:
        """InputError if the datastore holds tokens that the target does not have."""
        tokens = self.datastore.tokens
        highest = int(tokens[tokens != END].max())
        if highest >= target.vocab_size:
            raise InputError(
                f"the datastore holds token {highest}, the target has {target.vocab_size}: it was made with another "
                "tokenizer; index the texts again with the target's"
            )

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.sequences = context.sequences

    def propose(self, count: int) -> Draft:
        s, tries = self.sequences, {}
        contexts = [tuple(h[-self.longest :]) if r else () for h, r in zip(s.history, s.running, strict=True)]
        for context in set(contexts):  # rows of one prompt have much in common
            found = np.empty((0, count), dtype=np.uint32)
            if context:
                found = self.datastore.continuations(context, count, self.longest, self.shortest)
            tries[context] = trie(found, self.nodes)
        return side_by_side([tries[context] for context in contexts], s)

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        pass


def side_by_side(rows: Sequence[tuple[list[int], list[int]]], sequences: Sequences) -> Draft:
    """A tree a row, as its nodes' tokens and parents, in one draft of certain nodes."""
    size = max(len(tokens) for tokens, _ in rows)
    # a row with fewer nodes repeats its last token under the root: as a draft it is as good as any
    tokens = [[*t, *[h[-1]] * (size - len(t))] for (t, _), h in zip(rows, sequences.history, strict=True)]
    parents = [[*p, *[-1] * (size - len(p))] for _, p in rows]
    tokens, parents = (torch.tensor(x, dtype=torch.long, device=sequences.device) for x in (tokens, parents))
    return Draft(tokens, None, Tree(parents))
