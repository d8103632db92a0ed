"""Trees from drafters that draft token by token, all nodes of a level in one forward under an ancestor mask.

`LikeliestTree`, certain nodes. EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees, 2406.16858 §4:
with q(v | path) the drafter's distribution, a node's value is the probability of its path, V_i = Π_{j ≤ i} q_j. A level
offers the likeliest children of its nodes, the `width` best of which go on; then the `nodes` best of all levels are
checked. OPT-Tree: Speculative Decoding with Adaptive Draft Tree Structure, 2406.17276 §3: those nodes are the subtree
with the greatest expected number of accepted tokens, E(A) = Σ_i V_i, and another level is drafted only while it raises
E(A) by more than a threshold δ. Exact whatever the tree: the target's own draw at a node picks the child.

`SampledTree`, drawn nodes. Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding, 2402.12374 §3: a fixed
shape, the best one for given acceptance rates by rank, and children drawn without replacement from q. Exact under the
recursive walk (`polyspec.verification.walk_recursive`), which takes q for what the children were really drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.errors import ConfigError
from polyspec.lengths import positive
from polyspec.target import Target
from polyspec.trees import Tree, eagle2_expand, opt_tree, sequoia


class LevelDrafter(Drafter, Protocol):
    """A drafter that scores what may follow the nodes of a tree, a level at a time, in a cache of its own."""

    reach: int
    """How many levels it can score."""
    vocabulary: Tensor | None
    """Once begun: ids of the tokens that it may draft `[V_d]`, None for all; others are -inf in what it scores."""

    def root(self) -> Tensor:
        """Logits `[B, 1, V]` of what follows each row's last committed token."""
        ...

    def level(self, tokens: Tensor, tree: Tree) -> Tensor:
        """Logits `[B, W, V]` of what follows the last W nodes of `tree` (parents `[B, M]`), which carry `tokens [B, W]`;
        the other M - W have been through. -inf for tokens that are never drafted."""
        ...

    def rollback(self) -> None:
        """Forget the tree: the cache ends with the last committed token again."""
        ...


class LevelTree:
    """What both kinds of tree share: `inner(**needs)` and the nodes it has been through, those that have children."""

    def __init__(self, inner: Callable[..., LevelDrafter], nodes: int, **needs: Any):
        self.nodes = positive("nodes", nodes)
        self.inner = inner(**needs)
        self.hidden_layers = self.inner.hidden_layers

    def check(self, target: Target) -> None:
        self.inner.check(target)

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.context = context
        self.inner.begin(context, hidden)

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        self.inner.observe(hidden, accepted)

    def most(self, children: int) -> int:
        """How many children a node may have: no more than there are tokens, and one where siblings, which share a
        position, cannot be told from a chain."""
        target = self.context.target
        return 1 if target.lockstep else min(children, target.vocab_size)

    def plant(self) -> Tensor:
        """Begin a tree: scores `[B, 1, V]` of the root's children."""
        none = self.context.sequences.tail(1)[:, :0]
        self.fed, self.tree, self.wide = none, Tree(none, 0, 0), 1
        return self.scores(self.inner.root())

    def grow(self, tokens: Tensor, under: Tensor) -> Tensor:
        """Another level: nodes `tokens [B, W]`, each hanging `under` the under-th node of the level before `[B, W]`, to
        the scores `[B, W, V]` of their children."""
        parents = torch.cat([self.tree.parents, under + self.fed.shape[1] - self.wide], dim=1)
        self.fed, self.wide = torch.cat([self.fed, tokens], dim=1), tokens.shape[1]
        self.tree = Tree(parents, self.tree.height + 1, max(self.tree.width, self.wide))
        return self.scores(self.inner.level(tokens, self.tree))

    def scores(self, logits: Tensor) -> Tensor:
        s, first = self.context.sequences, self.tree.size + 1 - logits.shape[1]
        return self.context.processing.scores(logits, s, self.fed, self.tree, first=first)

    def positions(self) -> Tensor:
        """Absolute positions `[B, W]` of the children of the level's nodes."""
        depth = self.tree.height
        return self.context.sequences.positions(depth + 1)[:, depth:].expand(-1, self.wide)


class LikeliestTree(LevelTree):
    """The likeliest `nodes` of the paths that `inner(**needs)` finds going on from the `width` likeliest of each level.

    threshold: δ of OPT-Tree, in tokens (about what a level costs in target calls), for one host synchronisation a level;
    None: always as deep as asked, as in EAGLE-2. With `width` = `nodes` no tree of that size and depth has a higher E(A).
    """

    def __init__(
        self,
        inner: Callable[..., LevelDrafter],
        nodes: int,
        width: int,
        threshold: float | None = None,
        **needs: Any,
    ):
        super().__init__(inner, nodes, **needs)
        self.width = positive("width", width)
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if threshold is not None and not (number and threshold >= 0):
            raise ConfigError(f"threshold must be a number ≥ 0, got {threshold!r}")
        self.threshold = threshold

    def propose(self, count: int) -> Draft:
        scores, ids = self.plant(), self.inner.vocabulary
        children = min(self.most(self.width), scores.shape[-1] if ids is None else len(ids))
        path = scores.new_zeros(len(scores), 1)  # log V of the level's nodes
        expected = scores.new_zeros(len(scores))
        paths, parents, tokens, before, start = [], [], [], -1, 0
        count = min(count, self.inner.reach)
        for level in range(count):
            q = self.context.draws.outlook(scores, self.positions())
            q = q if ids is None else q[..., ids]  # what is never drafted is not worth an exponential
            best = q.topk(children)
            log_q = best.values - q.logsumexp(-1, keepdim=True)
            log_q = log_q.nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # nothing may follow: last, like what has q = 0
            path, under, rank = eagle2_expand(path, log_q, max(self.width, self.nodes))
            token = best.indices.flatten(1).gather(1, under * children + rank)
            token = token if ids is None else ids[token]
            for found, new in ((paths, path), (parents, under + before), (tokens, token)):
                found.append(new)
            before, start = start, start + token.shape[1]
            keep, kept_parents, now = opt_tree(torch.cat(paths, 1), torch.cat(parents, 1), self.nodes)
            if level + 1 == count or not self.worth(now - expected, scores):
                break
            expected, path = now, path[:, : self.width]  # sorted: the best go on
            scores = self.grow(token[:, : self.width], under[:, : self.width])
        self.inner.rollback()
        every = torch.cat(paths, 1)
        size = self.context.length.budget(every.topk(keep.shape[1]).values)
        if size < keep.shape[1]:
            keep, kept_parents, _ = opt_tree(every, torch.cat(parents, 1), size)
        tree = Tree(kept_parents, height=min(len(tokens), size), width=min(children, size))
        return Draft(torch.cat(tokens, 1).gather(1, keep), None, tree)

    def worth(self, gain: Tensor, scores: Tensor) -> bool:
        """Whether to draft another level after one that raised E(A) by `gain [B]`."""
        context = self.context
        if self.threshold is not None and not bool(((gain > self.threshold) & context.sequences.running_tensor).any()):
            return False
        return context.length.keep_drafting(scores[:, :1])  # of the likeliest path


@dataclass(frozen=True, slots=True)
class Level:
    """The n nodes of one depth: which of the level's nodes above, of those with children, each hangs under `[n]`; its
    rank among its siblings `[n]`; which of the n have children `[W]`; and the most children drawn for one node."""

    under: Tensor
    rank: Tensor
    inner: Tensor
    most: int


class SampledTree(LevelTree):
    """The shape of at most `nodes` nodes that accepts most, its nodes drawn from `inner(**needs)`.

    acceptance_by_rank: how often the first, second, … child of an accepted node is the one accepted, from a run of your
    own if you can. Raises ConfigError for what are no probabilities, or if all are 0.
    """

    def __init__(
        self, inner: Callable[..., LevelDrafter], nodes: int, acceptance_by_rank: Sequence[float], **needs: Any
    ):
        super().__init__(inner, nodes, **needs)
        if isinstance(acceptance_by_rank, str) or not (
            isinstance(acceptance_by_rank, Sequence) and all(isinstance(p, int | float) for p in acceptance_by_rank)
        ):
            raise ConfigError(f"acceptance_by_rank must be a list of probabilities, got {acceptance_by_rank!r}")
        if sequoia(acceptance_by_rank, self.nodes, 1).size == 0:
            raise ConfigError("acceptance_by_rank must not be all 0: nothing would be drafted")
        self.acceptance = tuple(acceptance_by_rank)

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        super().begin(context, hidden)
        self.shapes: dict[int, tuple[Tree, list[Level], Tensor]] = {}

    def shape(self, depth: int) -> tuple[Tree, list[Level], Tensor]:
        """The best shape of at most `depth` levels; its levels; and where the root (0) and the nodes with children (m+1)
        are in it, all on the rows' device. Made once a run and depth."""
        if depth not in self.shapes:
            device = self.context.sequences.device
            tree = sequoia(self.acceptance[: self.most(len(self.acceptance))], self.nodes, depth)
            inner = torch.isin(torch.arange(-1, tree.size), tree.parents).nonzero()[:, 0]
            self.shapes[depth] = tree.to(device), levels(tree, device), inner.to(device)
        return self.shapes[depth]

    def propose(self, count: int) -> Draft:
        tree, plan, inner = self.shape(min(count, self.inner.reach))
        scores, draws = self.plant(), self.context.draws
        tokens, node_q = [], []
        for level in plan:
            children = draws.candidates(scores, self.positions(), level.most)
            tokens.append(children[:, level.under, level.rank])
            node_q.append(draws.draft_probs(scores))
            if len(level.inner):
                under = level.under[level.inner].expand(len(children), -1)
                scores = self.grow(tokens[-1][:, level.inner], under)
        self.inner.rollback()
        q = None
        if node_q[0] is not None:  # leaves have no children: zero there
            q = scores.new_zeros(len(scores), tree.size + 1, scores.shape[-1])
            q[:, inner] = torch.cat(node_q, dim=1)
        return Draft(torch.cat(tokens, dim=1), q, tree)


def levels(tree: Tree, device: torch.device) -> list[Level]:
    """The levels of a static shape in breadth-first order, on `device`."""
    depth, index = tree.depth[1:], torch.arange(tree.size)
    has_children = torch.isin(index, tree.parents)
    above, found = torch.tensor([-1]), []
    for level in range(1, tree.height + 1):
        nodes = index[depth == level]
        rank, inner = tree.rank[nodes], has_children[nodes].nonzero()[:, 0]
        under = torch.searchsorted(above, tree.parents[nodes])
        found.append(Level(under.to(device), rank.to(device), inner.to(device), int(rank.max()) + 1))
        above = nodes[inner]
    return found
