"""Walking a tree of certain nodes with a tolerance.

Li et al., "Fast and High-Quality Auto-Regressive Speech Synthesis via Speculative Decoding" (VADUSA), arXiv 2410.21951.

    at the root and at every node draw τ tokens y_1 … y_τ from p; a child is accepted if its token is among them;
    the longest path of accepted nodes is kept, and behind it y_1 is emitted.

Which children are accepted is a rule to be plugged in: `samples` is the paper's, `topk` and `typical` accept what is likely
enough and draw the token behind the path from p.
Guarantee: heuristic; τ = 1 is exact (the target's own draw picks the child). At temperature 0 loops do not ask it: the
target's most likely token picks the child.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from polyspec.trees import Tree
from polyspec.verification.checks import check_generator, check_knob, check_scores
from polyspec.verification.rule import rule
from polyspec.verification.sampling import sample
from polyspec.verification.tree_walk import check_tree, path_of


class Tolerance(Protocol):
    """Which children are good enough, and what comes where the walk ends."""

    def __call__(
        self, tokens: Tensor, above: Tensor, p: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Nodes `tokens [B, M]` whose parents are the rows `above [B, M]` of p `[B, M+1, V]`: accepted `[B, M]` bool given
        that the parent is, and the token to emit behind the root and each node `[B, M+1]`."""
        ...


def samples(
    tokens: Tensor, above: Tensor, p: Tensor, generator: torch.Generator | None, tolerance: float = 3
) -> tuple[Tensor, Tensor]:
    """Among `tolerance` draws of the target."""
    check_knob("tolerance", tolerance, 1)
    count = int(tolerance)
    drawn = sample(p.unsqueeze(2).expand(-1, -1, count, -1), generator)  # [B, M+1, τ]
    own = drawn.gather(1, above.unsqueeze(-1).expand(-1, -1, count))
    return (own == tokens.unsqueeze(-1)).any(-1), drawn[..., 0]


def topk(
    tokens: Tensor, above: Tensor, p: Tensor, generator: torch.Generator | None, tolerance: float = 3
) -> tuple[Tensor, Tensor]:
    """Among the target's `tolerance` likeliest tokens."""
    check_knob("tolerance", tolerance, 1)
    best = p.topk(min(int(tolerance), p.shape[-1])).indices
    own = best.gather(1, above.unsqueeze(-1).expand(-1, -1, best.shape[-1]))
    return (own == tokens.unsqueeze(-1)).any(-1), sample(p, generator)


def typical(
    tokens: Tensor, above: Tensor, p: Tensor, generator: torch.Generator | None, tolerance: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Typical of the target (2401.10774): p(x) > min(tolerance, 0.3 · tolerance · exp(-H(p)))."""
    check_knob("tolerance", tolerance, 0, 1)
    entropy = torch.special.entr(p).sum(-1, dtype=torch.float32)
    least = (0.3 * tolerance * (-entropy).exp()).clamp(max=tolerance).gather(1, above)
    chosen = p.gather(1, above.unsqueeze(-1).expand(-1, -1, p.shape[-1])).gather(-1, tokens.clamp(min=0).unsqueeze(-1))
    return chosen.squeeze(-1) > least, sample(p, generator)


@rule(guarantee="heuristic", paper="2410.21951", certain=True)
def walk_tolerant(
    tokens: Tensor,
    parents: Tensor,
    node_q: Tensor | None,
    target_probs: Tensor,
    *,
    tolerance: Callable[..., tuple[Tensor, Tensor]] = samples,
    depth: int | None = None,
    children: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The longest path of nodes that `tolerance` accepts; of several the one whose last node comes first.

    tokens [B, M] long, -1 for no node; parents [M] or [B, M] long; node_q is not used; target_probs [B, M+1, V]. depth: at
    least the depth of the tree (default M), the width of the path; children is not used. Returns (path [B, depth] node
    indices padded with -1, accepted [B], next_token [B]). Raises InputError for shapes, dtypes or devices that do not fit,
    ConfigError for knobs out of range.
    """
    parents = check_tree(tokens, parents, target_probs)
    check_scores("target_probs", target_probs, 3, tokens.device)
    check_generator(generator, tokens.device)
    nodes = tokens.shape[1]
    good, emitted = tolerance(tokens, parents + 1, target_probs, generator)
    tree = Tree(parents, nodes if depth is None else depth, nodes)
    reached = torch.nn.functional.pad(good & (tokens >= 0), (1, 0), value=True)  # the root, then the nodes
    kept = ~(tree.ancestors & ~reached.unsqueeze(1)).any(-1)  # [B, M+1]: accepted with all that is above
    order = torch.arange(nodes + 1, device=tokens.device)
    end = torch.where(kept, tree.depth * (nodes + 1) + (nodes - order), -1).argmax(1)
    on_path = tree.ancestors[torch.arange(len(tokens), device=tokens.device), end][:, 1:]
    path, accepted, last = path_of(on_path, tree.height)
    return path, accepted, emitted.gather(1, last.unsqueeze(1)).squeeze(1)
