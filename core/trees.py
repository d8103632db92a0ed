"""Shapes of drafted trees.

A tree of M drafted nodes hangs under the root, each row's last committed token. Node m has parents[m] < m, -1 for the
root; siblings are in the order in which they are tried. What includes the root (depth, ancestors, children) has it at
index 0 and node m at m + 1, like the tokens of one target forward: the committed token, then the drafts.

* static shapes: `chain`, `full`, `sequoia` (2402.12374), `medusa_tree` (2401.10774);
* chosen per row and round, without host synchronisation: `eagle2_expand` and `eagle2_select` (2406.16858), `opt_tree`
  (2406.17276), `best_first_block` (DDTree, 2604.12989).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from polyspec.errors import ConfigError, InputError


@dataclass(frozen=True, eq=False)
class Tree:
    """One shape for all rows (parents [M]) or one a row ([B, M]).

    height and width bound its depth and the number of children of a node; left out they are measured, and the parents
    checked to come before their children, which synchronises for a tree on an accelerator.
    """

    parents: Tensor
    height: int = -1
    width: int = -1

    def __post_init__(self) -> None:
        if self.parents.dtype != torch.long or self.parents.dim() not in (1, 2):
            raise InputError(f"parents must be long [M] or [B, M], not {self.parents.dtype} {list(self.parents.shape)}")
        measure = self.height < 0 or self.width < 0
        if measure or self.parents.device.type == "cpu":
            order = torch.arange(self.size, device=self.parents.device)
            if not bool(((self.parents >= -1) & (self.parents < order)).all()):
                raise InputError("every parent must come before its children: -1 <= parents[m] < m")
        if measure:
            object.__setattr__(self, "height", int(self.depth.max()))
            object.__setattr__(self, "width", int(self.rank.max()) + 1 if self.parents.numel() else 0)

    @property
    def size(self) -> int:
        """M, the number of drafted nodes."""
        return self.parents.shape[-1]

    @cached_property
    def ancestors(self) -> Tensor:
        """[M+1, M+1] bool ([B, ..]): [i, j] if j is i or above i; the attention mask among the root and its nodes."""
        index = torch.arange(self.size + 1, device=self.parents.device)
        above = functional.pad(self.parents + 1, (1, 0))
        reach = ((above.unsqueeze(-1) == index) | (index.unsqueeze(-1) == index)).float()
        for _ in range(max(self.size, 0).bit_length()):  # paths of length 1, 2, 4, ..
            reach = (reach @ reach).clamp_(max=1)
        return reach > 0

    @cached_property
    def depth(self) -> Tensor:
        """[M+1] long ([B, ..]): 0 for the root. Position of a node: that of the last committed token + its depth."""
        return self.ancestors.sum(-1) - 1

    @cached_property
    def rank(self) -> Tensor:
        """[M] long ([B, ..]): how many siblings come before each node: a static tree's node is its parent's rank-th."""
        same = self.parents.unsqueeze(-1) == self.parents.unsqueeze(-2)
        return same.tril(-1).sum(-1)

    @cached_property
    def children(self) -> Tensor:
        """[M+1, width] long ([B, ..]): the nodes under the root and under each node, in order, padded with -1."""
        index = torch.arange(self.size, device=self.parents.device)
        under = torch.arange(-1, self.size, device=self.parents.device).unsqueeze(-1) == self.parents.unsqueeze(-2)
        table = torch.where(under, index, self.size).sort(-1).values[..., : self.width]
        return torch.where(table == self.size, -1, table)

    def path_to(self, node: int) -> Tensor:
        """The drafted nodes from the root down to `node` (0: the root, m + 1: node m, included); for a shared shape."""
        if self.parents.dim() != 1:
            raise InputError("path_to needs a tree whose shape all rows share")
        return self.ancestors[node, 1:].nonzero()[:, 0]

    def to(self, device: torch.device | str) -> Tree:
        """The same tree on another device."""
        return Tree(self.parents.to(device), self.height, self.width)


def chain(length: int) -> Tree:
    """`length` nodes in a row."""
    return Tree(torch.arange(-1, length - 1), height=length, width=min(length, 1))


def full(branching: Sequence[int]) -> Tree:
    """Every node of depth d has branching[d] children; (K,) * D is the full K-ary tree of depth D."""
    parents, level = [], [-1]
    for width in branching:
        if width < 1:
            raise ConfigError(f"branching factors must be at least 1, not {list(branching)}")
        above = [node for node in level for _ in range(width)]
        level = list(range(len(parents), len(parents) + len(above)))
        parents += above
    return Tree(torch.tensor(parents, dtype=torch.long))


def sequoia(acceptance_by_rank: Sequence[float], nodes: int, depth: int) -> Tree:
    """The tree of at most `nodes` nodes and `depth` levels that accepts most tokens (Chen et al., 2402.12374).

    acceptance_by_rank[k]: the probability that the k-th child of an accepted node is the one accepted. With c_d(n) the
    expected number accepted under a node that n descendants in d levels hang from,
        c_d(n) = max over n_1 + .. + n_k = n of Σ_i p_i · (1 + c_{d-1}(n_i - 1)).
    """
    _check_shape(nodes, depth)
    p = np.asarray(acceptance_by_rank, dtype=np.float64)
    if p.ndim != 1 or len(p) == 0 or not ((p >= 0) & (p <= 1)).all():
        raise ConfigError("acceptance_by_rank must be a list of probabilities, one a rank")
    value = np.zeros(nodes + 1)  # c_d, d = 0
    plans: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for _ in range(depth):
        exact = np.full(nodes + 1, -np.inf)  # exactly n nodes in the first k subtrees
        exact[0] = 0.0
        best, ranks, used = exact.copy(), np.zeros(nodes + 1, int), np.zeros(nodes + 1, int)
        sizes = np.zeros((len(p) + 1, nodes + 1), int)
        for k, chance in enumerate(p, start=1):
            subtree = np.concatenate([[-np.inf], chance * (1 + value[:-1])])  # of 0, 1, .. nodes
            total = exact[:, None] + subtree[None, :]
            exact, sizes[k] = _antidiagonal_max(total)
            better = exact > best
            best, ranks = np.where(better, exact, best), np.where(better, k, ranks)
        used = np.array([int(best[: n + 1].argmax()) for n in range(nodes + 1)])  # at most n nodes
        plans.append((ranks, sizes, used))
        value = best[used]

    parents: list[int] = []
    queue = [(-1, nodes, depth)]  # breadth first
    for parent, budget, levels in queue:
        if levels == 0 or budget == 0:
            continue
        ranks, sizes, used = plans[levels - 1]
        left = int(used[budget])
        share = []
        for k in range(int(ranks[left]), 0, -1):
            share.append(int(sizes[k][left]))
            left -= share[-1]
        for size in reversed(share):
            queue.append((len(parents), size - 1, levels - 1))
            parents.append(parent)
    return Tree(torch.tensor(parents, dtype=torch.long))


def medusa_tree(head_accuracies: Sequence[Sequence[float]], nodes: int) -> Tree:
    """Add, one at a time, the node most likely to be right (Cai et al., 2401.10774).

    head_accuracies[d][k]: how often the k-th guess for depth d + 1 is right; a path's accuracy is the product.
    """
    _check_shape(nodes, 1)
    if not head_accuracies or any(not 0 <= a <= 1 for row in head_accuracies for a in row):
        raise ConfigError("head_accuracies must be lists of probabilities, one list a depth")
    parents: list[int] = []
    depths: list[int] = []
    # (-accuracy, tie-break, parent, accuracy of the parent's path, depth, rank)
    heap: list[tuple[float, int, int, float, int, int]] = []
    pushed = 0

    def push(parent: int, path: float, depth: int, rank: int) -> None:
        nonlocal pushed
        if depth < len(head_accuracies) and rank < len(head_accuracies[depth]):
            heapq.heappush(heap, (-path * head_accuracies[depth][rank], pushed, parent, path, depth, rank))
            pushed += 1

    push(-1, 1.0, 0, 0)
    while heap and len(parents) < nodes:
        accuracy, _, parent, path, depth, rank = heapq.heappop(heap)
        push(parent, path, depth, rank + 1)
        push(len(parents), -accuracy, depth + 1, 0)
        parents.append(parent)
        depths.append(depth)
    order = sorted(range(len(parents)), key=depths.__getitem__)  # breadth first, like the other static shapes
    place = {old: new for new, old in enumerate(order)} | {-1: -1}
    return Tree(torch.tensor([place[parents[old]] for old in order], dtype=torch.long))


def eagle2_expand(scores: Tensor, child_log_probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """One level of EAGLE-2 (Li et al., 2406.16858): of all children of the frontier keep the k likeliest paths.

    scores [B, W]: the frontier's cumulative log-probabilities; child_log_probs [B, W, C].
    Returns (scores [B, k], which of the W each hangs under [B, k], which of its C children it is [B, k]), k <= W·C.
    """
    count = child_log_probs.shape[-1]
    paths = (scores.unsqueeze(-1) + child_log_probs).flatten(1)
    best = paths.topk(min(k, paths.shape[1]))
    return best.values, best.indices // count, best.indices % count


def eagle2_select(scores: Tensor, parents: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Re-rank everything drafted and keep the best `nodes` (EAGLE-2, 2406.16858).

    scores [B, M] cumulative log-probabilities; parents [B, M] long, parents[m] < m, -1 the root.
    Returns (indices [B, n] of the kept nodes, ascending; their parents among the kept [B, n]), n = min(nodes, M).
    As no node is likelier than its parent and ties go to the earlier one, what is kept is a tree.
    """
    rows, size = scores.shape
    keep = scores.sort(dim=-1, descending=True, stable=True).indices[:, : min(nodes, size)].sort(-1).values
    new_index = torch.full((rows, size + 1), -1, dtype=torch.long, device=scores.device)
    new_index.scatter_(1, keep + 1, torch.arange(keep.shape[1], device=scores.device).expand_as(keep))
    return keep, new_index.gather(1, parents.gather(1, keep) + 1)


def opt_tree(scores: Tensor, parents: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """OPT-Tree (Wang et al., 2406.17276): the subtree with the greatest expected number of accepted tokens.

    Arguments and first two results as for `eagle2_select`; the third is that expectation, Σ exp(scores) over the kept,
    [B]. Draft another level while it grows by more than the cost of a draft call relative to a target call.
    """
    keep, kept_parents = eagle2_select(scores, parents, nodes)
    return keep, kept_parents, scores.gather(1, keep).exp().sum(-1)


def best_first_block(q: Tensor, nodes: int) -> tuple[Tensor, Tree, Tensor]:
    """The `nodes` likeliest paths through a block of independent distributions (DDTree, 2604.12989).

    q [B, N, V]: what a block drafter gives for N positions in one pass; a path's probability is its tokens' product.
    Returns (tokens [B, m], tree, log-probabilities of the paths [B, m]), m = `nodes` or all paths there are if fewer.
    Exact best-first search, level by level: one of the best m nodes has a parent among the best m of its level.
    The tokens are deterministic given q: verify them as one-hot drafts (`walk_deterministic` on draws from p).
    """
    _check_shape(nodes, 1)
    if q.dim() != 3 or not q.dtype.is_floating_point:
        raise InputError(f"q must be floating point [B, N, V], not {q.dtype} {list(q.shape)}")
    rows, length, vocab = q.shape
    best = q.topk(min(nodes, vocab), dim=-1)
    log_q = best.values.float().log()
    score, under = log_q.new_zeros(rows, 1), best.indices.new_full((rows, 1), -1)
    scores, parents, tokens, start = [], [], [], 0
    for level in range(length):
        score, above, rank = eagle2_expand(score, log_q[:, level : level + 1].expand(-1, score.shape[1], -1), nodes)
        parents.append(under.gather(1, above))
        tokens.append(best.indices[:, level].gather(1, rank))
        scores.append(score)
        under = torch.arange(start, start + score.shape[1], device=q.device).expand(rows, -1)
        start += score.shape[1]
    every = torch.cat(scores, 1)
    keep, kept_parents = eagle2_select(every, torch.cat(parents, 1), nodes)
    tree = Tree(kept_parents, height=min(length, nodes), width=min(nodes, vocab))
    return torch.cat(tokens, 1).gather(1, keep), tree, every.gather(1, keep)


def _antidiagonal_max(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each n the maximum of total[n - m, m] over m, and the m that reaches it."""
    size = len(total)
    n, m = np.arange(size)[:, None], np.arange(size)[None, :]
    table = np.where(m <= n, total[np.maximum(n - m, 0), m], -np.inf)
    return table.max(1), table.argmax(1)


def _check_shape(nodes: int, depth: int) -> None:
    if nodes < 1 or depth < 1:
        raise ConfigError(f"a tree needs at least one node and one level, not {nodes} and {depth}")
