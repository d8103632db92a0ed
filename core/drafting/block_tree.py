"""A tree out of one block of independent predictions: the likeliest paths through it.

DDTree, 2604.12989, for block drafters; Medusa's tree attention, 2401.10774 §2.1.1, with the tree chosen anew each round
instead of fixed. Exact whatever the tree: its nodes are certain, and the target's own draw at a node picks the child.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.drafting.level_tree import LikeliestTree
from polyspec.lengths import positive
from polyspec.target import Target
from polyspec.trees import Tree, best_first_block, eagle2_select


class BlockDrafter(Drafter, Protocol):
    """A drafter that predicts several positions at once."""

    vocabulary: Tensor | None
    """Once begun: ids of the tokens that it may draft `[V_d]`, None for all; others are -inf in what it predicts."""

    def block(self, count: int) -> Tensor:
        """Logits `[B, n, V]` of the next n ≤ `count` positions, each predicted without knowing the others' tokens."""
        ...


def block_tree(inner: Callable[..., Any], nodes: int, width: int = 4, **needs: Any) -> BlockTree | LikeliestTree:
    """The tree of the `nodes` likeliest paths for what `inner(**needs)` predicts: in one step where its positions are
    independent, level by level, the `width` likeliest of each going on, where they depend on each other (`in_turn`)."""
    drafter = inner(**needs)
    if drafter.in_turn:
        return LikeliestTree(lambda: drafter, nodes, width)
    return BlockTree(lambda: drafter, nodes)


class BlockTree:
    """The `nodes` likeliest paths through what the drafter `inner(**needs)` predicts."""

    def __init__(self, inner: Callable[..., BlockDrafter], nodes: int, **needs: Any):
        self.nodes = positive("nodes", nodes)
        self.inner = inner(**needs)
        self.hidden_layers = self.inner.hidden_layers

    def check(self, target: Target) -> None:
        self.inner.check(target)

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.context = context
        self.inner.begin(context, hidden)

    def propose(self, count: int) -> Draft:
        s, processing = self.context.sequences, self.context.processing
        logits = self.inner.block(count)
        # ranking needs no processor that looks at the drafted prefix: it only orders candidates
        scores = processing.scores(logits, s, s.tail(1)[:, :0]) if processing.history_free else logits.float()
        outlook, ids = self.context.draws.outlook(scores, s.positions(logits.shape[1])), self.inner.vocabulary
        q = (outlook if ids is None else outlook[..., ids]).softmax(-1)  # others are not worth an exponential
        tokens, tree, value = best_first_block(q, self.nodes)
        tokens = tokens if ids is None else ids[tokens]
        size = self.context.length.budget(value.sort(descending=True).values)
        if size < tree.size:
            keep, parents = eagle2_select(value, tree.parents, size)
            tokens, tree = tokens.gather(1, keep), Tree(parents, min(tree.height, size), min(tree.width, size))
        return Draft(tokens, None, tree)

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        self.inner.observe(hidden, accepted)
