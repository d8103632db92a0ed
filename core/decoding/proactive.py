"""A Jacobi window whose first positions branch, so that a rejected token has siblings to fall back on.

SJD-PAC: speculative Jacobi decoding with proactive drafting and adaptive continuation, 2603.18599. Adaptive
continuation is SCD-MC's coupling (2510.24211): behind the commit point the window's main chain goes on by modified
rejection whichever branch was kept. Proactive drafting: the first D positions carry a K-ary tree. With q_d the stored
distribution of window position d, of the K children of a node of depth d - 1

* on the main chain the first is the window's token x_d, the others are drawn from q_d without it, without replacement;
* off the main chain all K are drawn from q_d without replacement.

Children are verified against q_d by recursive rejection. Exact: every node was drawn from what it is verified against.
(Siblings drawn from the residual [p - q]+ instead would not be.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from polyspec.decoding.chain import fewest
from polyspec.decoding.jacobi import Initialisation, Jacobi
from polyspec.decoding.tree import along
from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.lengths import positive
from polyspec.trees import Tree, chain
from polyspec.verification import Verdict, walk_recursive
from polyspec.verification.rule import for_target


class ProactiveJacobi(Jacobi):
    """Jacobi's window under a tree of `branches` (K) children a node, `depth` (D) levels deep.

    rule: refines the main chain, every position on its own, from its own q to its own p (`scd_mc`). walk: a tree rule
    for children drawn without replacement. Where tokens are certain (temperature 0, shared noise) there is nothing to
    draw siblings from, and where a target takes no positions siblings cannot share one: both leave the plain window.
    """

    def __init__(
        self,
        rule: Callable[..., tuple[Tensor, Tensor]],
        init: Initialisation | str = "left",
        branches: int = 3,
        depth: int = 3,
        walk: Callable[..., tuple[Tensor, Tensor, Tensor]] = walk_recursive,
    ):
        super().__init__(rule, init)
        self.branches, self.depth, self.walk = positive("branches", branches), positive("depth", depth), walk

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
                levels = 0 if q is None or target.lockstep or self.branches == 1 else min(self.depth, width)
                shape = branching(width, self.branches, levels).to(x.device)
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
        levels_q, side = q[:, :levels], []
        for d in range(levels):
            weights = levels_q[:, d : d + 1]
            others = weights.scatter(-1, x[:, d : d + 1, None], 0.0)
            side.append(self.children(context, others, self.branches - 1))
            if off_main := self.branches**d - 1:
                side.append(self.children(context, weights.expand(-1, off_main, -1), self.branches))
        tokens = torch.cat([x[:, :levels], *side], dim=1)
        return Draft(tokens, levels_q[:, shape.walked.depth.clamp(max=levels - 1)], shape.walked)

    @staticmethod
    def children(context: Context, weights: Tensor, count: int) -> Tensor:
        """`count` tokens drawn without replacement from each of `weights [B, T, V]`: `[B, T · count]`, -1 for none."""
        positions = context.sequences.positions(1).expand(-1, weights.shape[1])
        drawn = context.draws.candidates(weights.log(), positions, count)
        return torch.where(weights.gather(-1, drawn) > 0, drawn, -1).flatten(1)


@dataclass(frozen=True)
class Branching:
    """A window of W tokens whose first D positions branch; nodes: the main chain, then `side` others."""

    forwarded: Tree  # W + side nodes
    walked: Tree  # the first D of the main chain and the others
    scored: Tensor  # where the root and the walked nodes are among the tokens of the forward, [1 + D + side]
    side: int

    def to(self, device: torch.device) -> Branching:
        if self.scored.device == device:
            return self
        return Branching(self.forwarded.to(device), self.walked.to(device), self.scored.to(device), self.side)


@lru_cache(maxsize=64)
def branching(width: int, branches: int, levels: int) -> Branching:
    """The shapes for W = `width`, K = `branches`, D = `levels`."""
    parents = list(range(-1, levels - 1))  # of the walked nodes
    level: list[int] = []  # off the main chain, of the depth before
    for d in range(levels):
        above = [d - 1] * (branches - 1) + [node for node in level for _ in range(branches)]
        level = list(range(len(parents), len(parents) + len(above)))
        parents += above
    side = len(parents) - levels

    def index(node: int) -> int:
        """A walked node's place among the forwarded ones."""
        return node if node < levels else node + width - levels

    whole = [*range(-1, width - 1), *(index(parent) for parent in parents[levels:])]
    scored = torch.tensor([0, *(1 + index(node) for node in range(len(parents)))])
    walked = Tree(torch.tensor(parents, dtype=torch.long)) if levels else chain(0)
    return Branching(Tree(torch.tensor(whole, dtype=torch.long)) if width else chain(0), walked, scored, side)
