"""Traversal verification: block verification on a tree.

Weng et al., "Traversal Verification for Speculative Tree Decoding", arXiv 2505.12398.

    Root: P = 1. A node x under v: P(x) = min(1, P(v) · p_v(x) / q_v(x)), with v's *current* P, p and q.
    Nodes are tested from the leaves up, left to right (post-order): accept x, with its path, with probability P(x).
    When x is rejected its parent changes: with R = Σ_w [P(v)·p_v(w) - q_v(w)]+,
        p_v := norm([P(v)·p_v - q_v]+),  P(v) := R / (R + 1 - P(v)),
        q_v := q_v without x, renormalised (children drawn without replacement), or unchanged (with replacement).
    The root is always accepted. The next token is drawn from the accepted node's current p.

Guarantee: exact; on a chain it is block verification.

Post-order depends on the tree's shape alone, so all rows step together. P(x) is needed before x's descendants are
tested: it is set for a node and the chain of first children under it when its preceding sibling is rejected.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.verification.checks import check_generator
from polyspec.verification.rule import rule
from polyspec.verification.sampling import at_position, sample, uniform
from polyspec.verification.tree_walk import check_tree, path_of, siblings

LARGE = 1e30  # stands for p/q where q = 0


@rule(guarantee="exact", paper="2505.12398")
def traversal_verification(
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
    """Verify a tree bottom-up.

    tokens [B, M] long (-1: no node); parents [M] or [B, M] long, -1 the root; node_q [B, M+1, V]: what the children of
    the root (0) and of each node (m+1) were drawn from, siblings in index order; target_probs [B, M+1, V].
    Returns (path [B, depth] node indices padded with -1, accepted [B], next_token [B]); depth defaults to M; children, which
    the walk down needs, is not looked at.
    Keeps float32 copies of both probability tensors and makes M steps of a few passes over [B, V].
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    shape = torch.atleast_2d(parents)  # [1, M] if all rows share it: then what depends on it is done once
    parents = check_tree(tokens, parents, node_q, target_probs)
    check_generator(generator, tokens.device)
    rows, nodes = tokens.shape
    row = torch.arange(rows, device=tokens.device)
    p, q = target_probs.float().clone(), node_q.float().clone()
    family, lineage = siblings(shape), ancestors(shape)
    order, following = _post_order(family, lineage).expand(rows, -1), _following(family).expand(rows, -1)
    top, slope, cap = _first_chains(p, q, tokens, parents, family)
    chance = torch.where(top == 0, torch.minimum(cap, slope), 0)  # P; index 0 is the root

    u = uniform(tokens, generator)
    end = torch.zeros_like(row)
    done = torch.zeros_like(row, dtype=torch.bool)
    for node in order.unbind(1):
        token = tokens[row, node]
        x = token.clamp(min=0)
        v = parents[row, node] + 1
        p_v, q_v, joint = p[row, v], q[row, v], chance[row, v]
        tested = (token >= 0) & (q_v[row, x] > 0) & ~done
        passed = tested & (u[row, node] < chance[row, node + 1])
        end = torch.where(passed, node + 1, end)
        done = done | passed
        rejected = tested & ~passed

        residual = (p_v * joint.unsqueeze(1)).sub_(q_v).clamp_(min=0)
        excess = residual.sum(1)
        scale = excess + 1 - joint
        joint = torch.where(rejected, torch.where(scale > 0, excess / scale, 1), joint)
        update = rejected & (excess > 0)
        p_v = torch.where(update.unsqueeze(1), residual / excess.unsqueeze(1), p_v)
        if not replacement:
            spent = torch.where(rejected, 0, q_v[row, x]).unsqueeze(1)
            q_v = q_v.scatter(1, x.unsqueeze(1), spent)
            total = q_v.sum(1, keepdim=True)
            q_v = torch.where(total > 0, q_v / total, q_v)
        p[row, v], q[row, v], chance[row, v] = p_v, q_v, joint

        sibling = following[row, node]  # as an index with the root at 0; 0 if there is none
        s = tokens[row, (sibling - 1).clamp(min=0)].clamp(min=0)
        entry = (joint * _ratio(p_v[row, s], q_v[row, s])).clamp(max=1)
        entered = (top == sibling.unsqueeze(1)) & (sibling > 0).unsqueeze(1)
        chance = torch.where(entered, torch.minimum(cap, slope * entry.unsqueeze(1)), chance)

    on_path = functional.pad(lineage, (0, 0, 1, 0)).expand(rows, -1, -1)[row, end]
    path, accepted, _ = path_of(on_path, nodes if depth is None else depth)
    return path, accepted, sample(at_position(p, end), generator)


def ancestors(parents: Tensor) -> Tensor:
    """parents [B, M] -> [B, M, M] bool: [m, a] if a is m or above m."""
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    reach = ((parents.unsqueeze(2) == index) | (index.unsqueeze(1) == index)).float()
    for _ in range(max(nodes - 1, 0).bit_length()):
        reach = (reach @ reach).clamp_(max=1)
    return reach > 0


def _post_order(family: Tensor, lineage: Tensor) -> Tensor:
    """[B, M]: the nodes in the order children before parents, left before right."""
    up = lineage.float()
    left = (up @ family.triu(1).float() @ up.transpose(1, 2)) > 0  # [u, v]: u is left of v
    before = left.sum(1) + lineage.sum(1)  # nodes to the left, and those below (with itself, in all counts alike)
    return before.argsort(1)


def _following(family: Tensor) -> Tensor:
    """[B, M]: the next sibling, as an index with the root at 0; 0 if there is none."""
    nodes = family.shape[1]
    index = torch.arange(1, nodes + 1, device=family.device)
    later = functional.pad(torch.where(family.triu(1), index, nodes + 1), (0, 1), value=nodes + 1).amin(2)
    return torch.where(later > nodes, 0, later)


def _first_chains(
    p: Tensor, q: Tensor, tokens: Tensor, parents: Tensor, family: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(top, slope, cap), each [B, M+1] with the root at 0: P(m) = min(cap, slope · P(top)) while nothing is rejected.

    `top` is the highest node m hangs under by first children only. The steps y -> min(1, ratio · y) are composed by
    pointer doubling: (slope, cap) after (slope', cap') is (slope·slope', min(cap, slope·cap')).
    """
    rows, nodes = tokens.shape
    row = torch.arange(rows, device=tokens.device).unsqueeze(1)
    x = tokens.clamp(min=0)
    ratio = _ratio(p[row, parents + 1, x], q[row, parents + 1, x])
    first = ~family.triu(1).any(1).expand(rows, -1)
    index = torch.arange(1, nodes + 1, device=tokens.device)
    top = functional.pad(torch.where(first, parents + 1, index), (1, 0))
    slope = functional.pad(torch.where(first, ratio, 1), (1, 0), value=1)
    cap = torch.ones_like(slope)
    for _ in range(nodes.bit_length()):
        cap = torch.minimum(cap, slope * cap.gather(1, top))
        slope = (slope * slope.gather(1, top)).clamp(max=LARGE)
        top = top.gather(1, top)
    return top, slope, cap


def _ratio(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p / q, 0).clamp(max=LARGE)
