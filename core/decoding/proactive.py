"""A Jacobi window whose first positions branch, so that a rejected token has siblings to fall back on.

SJD-PAC: speculative Jacobi decoding with proactive drafting and adaptive continuation, 2603.18599. Adaptive
continuation is SCD-MC's coupling (2510.24211): behind the commit point the window's main chain goes on by modified
rejection whichever branch was kept. Proactive drafting: the first D positions carry a tree, the K-ary one or, where
every node costs, its likeliest nodes. With q_d the stored distribution of window position d, of the children of a node of
depth d - 1

* on the main chain the first is the window's token x_d, the others are drawn from q_d without it, without replacement;
* off the main chain all are drawn from q_d without replacement.

Children are verified against q_d by recursive rejection. Exact: every node was drawn from what it is verified against.
(Siblings drawn from the residual [p - q]+ instead would not be.)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from polyspec.decoding.chain import fewest
from polyspec.decoding.jacobi import Initialisation, Jacobi
from polyspec.decoding.tree import along
from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.errors import ConfigError
from polyspec.lengths import positive
from polyspec.trees import Tree, chain
from polyspec.verification import Verdict, walk_recursive
from polyspec.verification.rule import for_target


class ProactiveJacobi(Jacobi):
    """Jacobi's window under a tree at most `depth` (D) levels deep, of `nodes` nodes beside the window's own.

    acceptance_by_rank: how often the k-th child of an accepted node is the one accepted, K numbers; they say which nodes of
    the K-ary tree are the likeliest. rule: refines the main chain, every position on its own, from its own q to its own p
    (`scd_mc`). walk: a tree rule for children drawn without replacement. Where tokens are certain (temperature 0, shared
    noise) there is nothing to draw siblings from, and where a target takes no positions siblings cannot share one: both
    leave the plain window.
    """

    def __init__(
        self,
        rule: Callable[..., tuple[Tensor, Tensor]],
        init: Initialisation | str = "left",
        nodes: int = 8,
        depth: int = 4,
        acceptance_by_rank: Sequence[float] = (0.8, 0.1, 0.05),
        refresh: int | None = None,
        walk: Callable[..., tuple[Tensor, Tensor, Tensor]] = walk_recursive,
    ):
        super().__init__(rule, init, refresh)
        self.nodes, self.depth, self.walk = positive("nodes", nodes), positive("depth", depth), walk
        self.chances = tuple(float(p) for p in acceptance_by_rank)
        if not self.chances or not all(0 < p < 1 for p in self.chances):
            raise ConfigError("acceptance_by_rank must be a list of probabilities between 0 and 1, one a rank")

    def run(self, context: Context, drafter: Drafter) -> None:
        """Generate until every row of `context.sequences` has stopped."""
        target, sequences, stats, draws = context.target, context.sequences, context.stats, context.draws
        rule = for_target(self.rule, target)
        context.length.begin(context)
        y, p, shift = sequences.tail(1), None, torch.zeros(sequences.batch, dtype=torch.long, device=sequences.device)
        while not sequences.finished:
            width = max(0, min(context.length.next(), sequences.remaining - 1))
            with stats.timed("draft"):
                x, q = self.slide(context, drafter, y, p, shift, width)
                nodes = 0 if q is None or target.lockstep else self.nodes
                shape = branching(width, min(self.depth, width), nodes, self.chances).to(x.device)
                levels = shape.walked.height
                tree = shape.forwarded if shape.side else None
                draft = self.branch(context, x, q, shape)
                tokens = torch.cat([x, draft.tokens[:, levels:].clamp(min=0)], dim=1)
            with stats.timed("target"):
                output = target.forward(torch.cat([sequences.tail(1), tokens], dim=1), tree)
            with stats.timed("verify"):
                scores = context.processing.scores(output.logits, sequences, tokens, tree)
                y, kept, p = draws.refine(rule, x, q, scores[:, : width + 1], sequences.positions(width + 1))
                # how far the main chain goes if the walk below reaches its end
                front = kept[:, levels:].long().cumprod(1).sum(1)
                shift = levels + front
                drafted, next_token = x, y.gather(1, shift[:, None])[:, 0]
                offsets = torch.arange(width + 1, device=x.device).expand(len(x), -1)
                if levels:
                    positions = sequences.positions(1) + shape.walked.depth
                    path, walked, token = draws.walk(self.walk, draft, scores[:, shape.scored], positions)
                    main = path[:, -1] == levels - 1
                    shift = torch.where(main, shift, walked)
                    next_token = torch.where(main, next_token, token)
                    path = path.clamp(min=0)
                    drafted = torch.cat([draft.tokens.gather(1, path).clamp(min=0), x[:, levels:]], dim=1)
                    offsets = torch.cat([offsets[:, :1], shape.scored[path + 1], offsets[:, levels + 1 :]], dim=1)
                if target.lockstep:
                    shift = fewest(shift, sequences.running_tensor)
                    next_token = y.gather(1, shift[:, None])[:, 0]
                best = scores.amax(-1).gather(1, offsets)
                gained = sequences.commit(drafted, Verdict(shift, next_token), best)
                if shape.side:
                    target.keep_path(offsets[:, : max(gained)])
                target.rollback(sequences.cached, sequences.running)
            with stats.timed("draft"):
                drafter.observe(along(output.hidden, offsets[:, : max(gained)]), shift)
            stats.record(width, gained, tokens.shape[1])
            context.length.observe(width, gained, stats)

    def branch(self, context: Context, x: Tensor, q: Tensor | None, shape: Branching) -> Draft:
        """The tree over the window `x [B, W]` drawn from `q [B, W, V]`: the main chain's first nodes, then the others
        level by level, -1 where q_d has no further token."""
        levels = shape.walked.height
        if q is None or not levels:
            return Draft(x[:, :0])
        levels_q, parents = q[:, :levels], shape.parents
        weights = levels_q[:, parents]  # what each node's children are drawn from
        beside = weights[:, :levels].scatter(-1, x[:, :levels, None], 0.0)  # the main chain's next token is there already
        drawn = self.children(context, torch.cat([beside, weights[:, levels:]], dim=1), shape.most)
        tokens = torch.cat([x[:, :levels], drawn.flatten(1)[:, shape.chosen]], dim=1)
        return Draft(tokens, levels_q[:, shape.walked.depth.clamp(max=levels - 1)], shape.walked)

    @staticmethod
    def children(context: Context, weights: Tensor, count: int) -> Tensor:
        """`count` tokens drawn without replacement from each of `weights [B, T, V]`: `[B, T, count]`, -1 for none."""
        positions = context.sequences.positions(1).expand(-1, weights.shape[1])
        drawn = context.draws.candidates(weights.log(), positions, count)
        return torch.where(weights.gather(-1, drawn) > 0, drawn, -1)


@dataclass(frozen=True)
class Branching:
    """A window of W tokens whose first positions branch; nodes: the main chain, then `side` others, level by level.

    parents: the depth of every node with children, [P], the main chain's first and each of them whether it has any or not;
    most: the most children of one; chosen: which of `most` draws for each are used, in the order of the nodes, [side]."""

    forwarded: Tree  # W + side nodes
    walked: Tree  # the first levels of the main chain and the others
    scored: Tensor  # where the root and the walked nodes are among the tokens of the forward, [1 + levels + side]
    side: int
    parents: Tensor
    most: int
    chosen: Tensor

    def to(self, device: torch.device) -> Branching:
        if self.scored.device == device:
            return self
        moved = self.forwarded.to(device), self.walked.to(device), self.scored.to(device), self.side
        return Branching(*moved, self.parents.to(device), self.most, self.chosen.to(device))


@lru_cache(maxsize=64)
def branching(width: int, depth: int, nodes: int, chances: tuple[float, ...]) -> Branching:
    """The window of W = `width` tokens with the `nodes` likeliest nodes beside its first `depth` positions."""
    families = likeliest(depth, nodes, chances)
    levels, most = len(families), max((max(f) for f in families), default=0)
    parents = list(range(-1, levels - 1))  # of the walked nodes
    having, chosen = list(range(levels)), []
    above: list[int] = []  # the nodes off the main chain one level up
    for d, (beside, *others) in enumerate(families):
        hang = [d - 1] * beside
        chosen += [d * most + k for k in range(beside)]
        for node, count in zip(above, others, strict=True):
            if count:
                hang += [node] * count
                chosen += [len(having) * most + k for k in range(count)]
                having.append(d)
        above = list(range(len(parents), len(parents) + len(hang)))
        parents += hang
    side = len(parents) - levels

    def index(node: int) -> int:
        """A walked node's place among the forwarded ones."""
        return node if node < levels else node + width - levels

    whole = [*range(-1, width - 1), *(index(parent) for parent in parents[levels:])]
    scored = torch.tensor([0, *(1 + index(node) for node in range(len(parents)))])
    walked = Tree(torch.tensor(parents, dtype=torch.long)) if levels else chain(0)
    forwarded = Tree(torch.tensor(whole, dtype=torch.long)) if width else chain(0)
    tables = torch.tensor(having, dtype=torch.long), most, torch.tensor(chosen, dtype=torch.long)
    return Branching(forwarded, walked, scored, side, *tables)


def likeliest(depth: int, nodes: int, chances: tuple[float, ...]) -> list[list[int]]:
    """How many children the likeliest tree has at each level: first the main chain's node (its own next one not counted),
    then each node off the main chain one level up. Levels behind the last one with a node are left out."""
    # a node is its path of ranks; a path of zeros is the main chain
    first, *others = chances
    waiting: list[tuple[float, tuple[int, ...]]] = []
    if others:
        waiting = [(-(first**d) * others[0], (0,) * d + (1,)) for d in range(depth)]
    heapq.heapify(waiting)
    tree: set[tuple[int, ...]] = set()
    while waiting and len(tree) < nodes:
        chance, path = heapq.heappop(waiting)
        tree.add(path)
        if path[-1] + 1 < len(chances):
            sibling = chance / chances[path[-1]] * chances[path[-1] + 1]
            heapq.heappush(waiting, (sibling, (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(waiting, (chance * first, (*path, 0)))
    families = []
    level: list[tuple[int, ...]] = []
    for d in range(max(map(len, tree), default=0)):
        heads = [(0,) * d, *level]
        families.append([sum(path[:-1] == head for path in tree if len(path) == d + 1) for head in heads])
        level = [path for head in heads for path in sorted(tree) if len(path) == d + 1 and path[:-1] == head]
    return families
