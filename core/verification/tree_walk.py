"""Verifying a drafted tree by walking down from its root.

Layout: node m of a row carries tokens[m] and hangs under node parents[m] < m; -1 is the root, the last committed token.
What belongs to the root is at index 0, what belongs to node m at index m + 1. Missing nodes have token -1.

`walk_deterministic`: the target's token at each node is given (an argmax, argmax(log p + Gumbel), a draw from p, or
what a rule for several candidates emits over the node's children, greedy_plus_one say) and the walk follows it: exact.
`walk_recursive`: recursive rejection among the children at each level (SpecInfer 2305.09781, RSD 2402.14160, Sequoia
2402.12374): exact for children drawn from a distribution, and it accepts more than following a draw.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.errors import InputError
from polyspec.verification.checks import check_generator, check_ids, check_knob, check_scores
from polyspec.verification.recursive_rejection import recursive_rejection
from polyspec.verification.rule import rule
from polyspec.verification.sampling import at_position


@rule(guarantee="exact", paper="2305.09781")
def walk_deterministic(
    tokens: Tensor, parents: Tensor, target_tokens: Tensor, *, depth: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the tokens the target chose, for as long as some child carries them.

    tokens [B, M] long; parents [M] or [B, M] long; target_tokens [B, M+1] long: the target's token at the root and
    after each node. depth: the depth of the tree or more (default M); it is the width of the path.
    Returns (path [B, depth] node indices padded with -1, accepted [B], next_token [B]).
    Of siblings with one token the first counts. Raises InputError for shapes, dtypes or devices that do not fit.
    """
    parents = check_tree(tokens, parents)
    check_ids("target_tokens", target_tokens, 2)
    rows, nodes = tokens.shape
    if target_tokens.shape != (rows, nodes + 1):
        raise InputError(f"target_tokens must be [{rows}, {nodes + 1}], not {list(target_tokens.shape)}")
    depth = tree_depth(depth, nodes)
    twin = siblings(parents) & (tokens.unsqueeze(2) == tokens.unsqueeze(1))
    on_path = (tokens == target_tokens.gather(1, parents + 1)) & ~twin.triu(1).any(1)
    path, accepted, last = path_of(reached(on_path, parents, depth), depth)
    return path, accepted, target_tokens.gather(1, last.unsqueeze(1)).squeeze(1)


@rule(guarantee="exact", paper="2402.12374")
def walk_recursive(
    tokens: Tensor,
    parents: Tensor,
    node_q: Tensor,
    target_probs: Tensor,
    *,
    replacement: bool = False,
    depth: int | None = None,
    children: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recursive rejection level by level.

    tokens [B, M] long; parents [M] or [B, M] long; node_q [B, M+1, V]: the distribution the children of the root (0)
    and of each node (m+1) were drawn from, siblings drawn in index order, with or without replacement;
    target_probs [B, M+1, V]. depth, children: at least the depth of the tree and the most children of a node; both
    default to M, which is right but slow (the walk makes depth x children steps of a few passes over [B, V]).
    Returns (path [B, depth] node indices padded with -1, accepted [B], next_token [B]).
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    parents = check_tree(tokens, parents, node_q, target_probs)
    check_generator(generator, tokens.device)
    rows, nodes = tokens.shape
    depth = tree_depth(depth, nodes)
    children = min(nodes if children is None else children, nodes)
    row = torch.arange(rows, device=tokens.device)
    index = torch.arange(nodes, device=tokens.device)
    here = torch.zeros_like(row)  # 0 is the root, m + 1 node m
    walking = torch.ones_like(row, dtype=torch.bool)
    next_token = torch.full_like(row, -1)
    path = []
    for level in range(depth + 1):
        if level and tokens.device.type == "cpu" and not bool(walking.any()):  # elsewhere it would be a synchronisation
            path += [torch.full_like(row, -1)] * (depth - len(path))
            break
        below = (parents + 1 == here.unsqueeze(1)) & (tokens >= 0) & walking.unsqueeze(1)
        child = torch.where(below, index, nodes).sort(1).values[:, : children if level < depth else 0]
        child = torch.where(child == nodes, -1, child)
        candidates = torch.where(child >= 0, tokens.gather(1, child.clamp(min=0)), -1)
        verdict = recursive_rejection(
            at_position(target_probs, here),
            candidates,
            at_position(node_q, here),
            replacement=replacement,
            generator=generator,
        )
        stepped = verdict.accepted > 0
        next_token = torch.where(walking & ~stepped, verdict.next_token, next_token)
        walking = walking & stepped
        if level < depth:
            taken = functional.pad(child, (1, 0), value=-1).gather(1, verdict.accepted.unsqueeze(1)).squeeze(1)
            path.append(taken)
            here = torch.where(walking, taken + 1, here)
    walked = torch.stack(path, 1) if path else tokens.new_zeros(rows, 0)
    return walked, (walked >= 0).sum(1), next_token


def check_tree(tokens: Tensor, parents: Tensor, *node_probs: Tensor) -> Tensor:
    """Shapes, dtypes and devices of a batch of trees; returns parents as [B, M]."""
    check_ids("tokens", tokens, 2)
    check_ids("parents", parents, parents.dim())
    rows, nodes = tokens.shape
    if parents.shape not in {(nodes,), (rows, nodes)} or parents.device != tokens.device:
        raise InputError(
            f"parents must be [{nodes}] or [{rows}, {nodes}] on {tokens.device}, "
            f"not {list(parents.shape)} on {parents.device}"
        )
    for probs in node_probs:
        check_scores("node probabilities", probs, 3, tokens.device)
        if probs.shape[:2] != (rows, nodes + 1) or probs.shape != node_probs[0].shape:
            raise InputError(f"node probabilities must all be [{rows}, {nodes + 1}, V], not {list(probs.shape)}")
    return parents.expand(rows, nodes)


def siblings(parents: Tensor) -> Tensor:
    """parents [B, M] -> [B, M, M] bool: which nodes share a parent (each with itself too)."""
    return parents.unsqueeze(2) == parents.unsqueeze(1)


def reached(passable: Tensor, parents: Tensor, depth: int) -> Tensor:
    """Nodes that are passable, and all of their ancestors too: passable [B, M] bool, parents [B, M] -> [B, M] bool."""
    on_path = functional.pad(passable, (1, 0), value=True)
    above = functional.pad(parents + 1, (1, 0))
    for _ in range((depth - 1).bit_length() if depth else 0):  # pointer doubling, with the root at index 0
        on_path = on_path & on_path.gather(1, above)
        above = above.gather(1, above)
    return on_path[:, 1:]


def path_of(on_path: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """A path as a mask [B, M] -> (its nodes in order, padded with -1, [B, depth]; length [B]; index of its end [B]).

    The end's index counts the root as 0 and node m as m + 1. Parents come before children, so ascending is downward.
    """
    nodes = on_path.shape[1]
    index = torch.arange(nodes, device=on_path.device)
    path = torch.where(on_path, index, nodes).sort(1).values[:, :depth]
    path = functional.pad(torch.where(path == nodes, -1, path), (0, depth - path.shape[1]), value=-1)
    end = functional.pad(torch.where(on_path, index + 1, 0), (1, 0)).amax(1)
    return path, on_path.sum(1), end


def tree_depth(depth: int | None, nodes: int) -> int:
    """`depth`, by default the most that `nodes` nodes can have; ConfigError below 0."""
    depth = nodes if depth is None else depth
    check_knob("depth", depth, 0)
    return depth
