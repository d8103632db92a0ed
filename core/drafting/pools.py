"""Pools of texts that grow while answers are generated, one a group of users or items.

A Decoding Acceleration Framework for Industrial Deployable LLM-based Recommender Systems (DARE), 2408.05676: a trie of
every suffix of a group's texts to depth 13. How often a path was seen in prompts and in outputs is counted apart; counts
are halved as time goes by, and the rarest nodes make room once there are too many.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from polyspec.errors import CheckpointError, InputError
from polyspec.files import whole_file
from polyspec.lengths import positive

DEPTH = 13
LIMIT = 131_072
PERIOD = 1024
Source = Literal["prompt", "output"]


class Node:
    """What was seen along one path: how often in prompts and in outputs, and in which text last."""

    __slots__ = ("children", "output", "prompt", "seen")

    def __init__(self, prompt: float = 0.0, output: float = 0.0, seen: int = 0):
        self.children: dict[int, Node] = {}
        self.prompt, self.output, self.seen = prompt, output, seen


class Pool:
    """One group's trie.

    limit: the most nodes; beyond it the rarest quarter is evicted, of equally rare ones those not seen for longest.
    period: after so many texts all counts are halved, and what falls below one occurrence is forgotten.
    """

    def __init__(self, limit: int = LIMIT, period: int = PERIOD):
        self.limit, self.period = positive("limit", limit), positive("period", period)
        self.root, self.size, self.texts, self.highest = Node(), 0, 0, -1

    def begin(self, prompt: Sequence[int], times: int = 1) -> None:
        """Another text (or `times` equal ones) begins, with `prompt`."""
        before, self.texts = self.texts, self.texts + times
        if self.texts // self.period > before // self.period:
            self.halve()
        self.extend(prompt, len(prompt), "prompt", times)

    def extend(self, tokens: Sequence[int], new: int, source: Source, times: int = 1) -> None:
        """Count every path of at most DEPTH tokens that ends with one of the last `new` of a text's `tokens`."""
        for end in range(len(tokens) - new, len(tokens)):
            token = int(tokens[end])
            self.highest = max(self.highest, token)
            for start in range(max(0, end + 1 - DEPTH), end + 1):
                above = self.find(tokens[start:end])
                if above is None:  # evicted since; what remains is connected
                    continue
                node = above.children.get(token)
                if node is None:
                    node = above.children[token] = Node()
                    self.size += 1
                node.seen = self.texts
                if source == "prompt":
                    node.prompt += times
                else:
                    node.output += times
        if self.size > self.limit:
            self.evict()

    def find(self, path: Sequence[int]) -> Node | None:
        """The node that `path` leads to, None if it was not seen."""
        node: Node | None = self.root
        for token in path:
            if node is None:
                return None
            node = node.children.get(token)
        return node

    def nodes(self) -> Iterator[tuple[Node, int, int]]:
        """Every node but the root, parents first, with its token and its parent's place in this order (-1: the root)."""
        stack, place = [(self.root, -1)], 0
        while stack:
            above, at = stack.pop()
            for token, node in above.children.items():
                yield node, token, at
                stack.append((node, place))
                place += 1

    def halve(self) -> None:
        """Every count becomes half of itself."""
        for node, _, _ in self.nodes():
            node.prompt /= 2
            node.output /= 2
        self.keep({id(node) for node, _, _ in self.nodes() if node.prompt + node.output >= 1})

    def evict(self) -> None:
        """Make room: keep three quarters of `limit`."""
        nodes = [node for node, _, _ in self.nodes()]
        # stable, and a parent, at least as frequent as its children, comes first
        nodes.sort(key=lambda node: (node.prompt + node.output, node.seen), reverse=True)
        self.keep({id(node) for node in nodes[: self.limit - self.limit // 4]})

    def keep(self, chosen: set[int]) -> None:
        """Drop every node, with what is below it, whose id is not among the chosen."""
        self.size, stack = 0, [self.root]
        while stack:
            above = stack.pop()
            above.children = {token: node for token, node in above.children.items() if id(node) in chosen}
            self.size += len(above.children)
            stack.extend(above.children.values())


@dataclass(slots=True)
class Drafted:
    """A tree under construction: its nodes' tokens, each one's parent (-1: the root), and where each child is."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    place: dict[tuple[int, int], int] = field(default_factory=dict)

    def grow(self, below: Node, size: int, depth: int, weight: float) -> None:
        """Add the most frequent paths below a node of a pool, at most `depth` tokens long, until there are `size` nodes.

        weight: what an occurrence in a prompt counts, beside one in an output."""
        heap: list[tuple[float, int, int, int, Node, int]] = []
        pushed = 0

        def push(node: Node, at: int, level: int) -> None:
            nonlocal pushed
            for token, child in node.children.items():
                frequency = child.output + weight * child.prompt
                if frequency > 0 and level <= depth:
                    heapq.heappush(heap, (-frequency, pushed, at, token, child, level))
                    pushed += 1

        push(below, -1, 1)
        while heap and len(self.tokens) < size:
            _, _, parent, token, node, level = heapq.heappop(heap)
            if (parent, token) not in self.place:
                self.place[parent, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
            push(node, self.place[parent, token], level + 1)


class Pools:
    """A pool a group, made when a group is first asked for. `save` writes all of them to one file."""

    def __init__(self, limit: int = LIMIT, period: int = PERIOD):
        self.limit, self.period = positive("limit", limit), positive("period", period)
        self.groups: dict[str, Pool] = {}

    def __getitem__(self, group: str) -> Pool:
        if group not in self.groups:
            self.groups[group] = Pool(self.limit, self.period)
        return self.groups[group]

    @property
    def highest(self) -> int:
        """The highest token in any pool, -1 if all are empty."""
        return max((pool.highest for pool in self.groups.values()), default=-1)

    @classmethod
    def from_tokens(cls, texts: Mapping[str, Sequence[Sequence[int]]], **sizes: int) -> Pools:
        """Pools of outputs that are there already: token lists by group. Raises InputError for strings."""
        pools = cls(**sizes)
        for group, outputs in texts.items():
            for tokens in outputs:
                if isinstance(tokens, str):
                    raise InputError(f"group {group!r} holds strings; give token lists: tokenizer(text)['input_ids']")
                pools[group].begin(())
                pools[group].extend(tokens, len(tokens), "output")
        return pools

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all. Raises InputError if it cannot be written."""
        tensors: dict[str, np.ndarray] = {}
        for number, pool in enumerate(self.groups.values()):
            rows = list(pool.nodes())
            numbers = [(token, parent, node.seen) for node, token, parent in rows]
            counts = [(node.prompt, node.output) for node, _, _ in rows]
            tensors[f"{number}.nodes"] = np.array(numbers, dtype=np.int64).reshape(-1, 3)
            tensors[f"{number}.counts"] = np.array(counts, dtype=np.float64).reshape(-1, 2)
        about = [{"group": group, "texts": pool.texts} for group, pool in self.groups.items()]
        with whole_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"retrieval_pools": json.dumps(about)})

    @classmethod
    def load(cls, path: str | PathLike[str], **sizes: int) -> Pools:
        """Read what `save` wrote. Raises CheckpointError if it is missing or damaged."""
        pools = cls(**sizes)
        try:
            with safe_open(path, framework="numpy") as stored:
                about: Any = json.loads((stored.metadata() or {})["retrieval_pools"])
                for number, entry in enumerate(about):
                    pool = pools[str(entry["group"])]
                    pool.texts = int(entry["texts"])
                    fill(pool, stored.get_tensor(f"{number}.nodes"), stored.get_tensor(f"{number}.counts"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read the pools {path} ({error}); Pools.save writes them") from error
        return pools


def fill(pool: Pool, nodes: np.ndarray, counts: np.ndarray) -> None:
    """Put stored nodes `[n, 3]` (token, parent, last text) and counts `[n, 2]` into an empty pool; ValueError for nonsense."""
    if nodes.ndim != 2 or nodes.shape[1] != 3 or counts.shape != (len(nodes), 2):
        raise ValueError(f"shapes {nodes.shape} and {counts.shape}")
    order = np.arange(len(nodes))
    if not (np.isfinite(counts).all() and (counts >= 0).all() and (nodes[:, 0] >= 0).all()):
        raise ValueError("counts or tokens out of range")
    if not ((nodes[:, 1] >= -1) & (nodes[:, 1] < order)).all():
        raise ValueError("a node comes before its parent")
    made: list[Node] = []
    for (token, parent, seen), (prompt, output) in zip(nodes.tolist(), counts.tolist(), strict=True):
        made.append(Node(prompt, output, seen))
        (made[parent] if parent >= 0 else pool.root).children[token] = made[-1]
    pool.size, pool.highest = len(made), int(nodes[:, 0].max(initial=-1))
    if pool.size > pool.limit:
        pool.evict()
