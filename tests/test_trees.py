"""Tree shapes: valid, optimal where they claim to be, and chosen without waiting for the device."""

from __future__ import annotations

import itertools

import pytest
import torch

from polyspec import trees
from polyspec.errors import ConfigError, InputError
from polyspec.trees import Tree
from polyspec.verification import walk_deterministic


def random_parents(nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([int(torch.randint(-1, m, (), generator=generator)) for m in range(nodes)], dtype=torch.long)


def lineage(parents, node):
    """The nodes from the root down to `node`, by hand."""
    return [] if node < 0 else [*lineage(parents, parents[node]), node]


@pytest.mark.parametrize("nodes", [0, 1, 2, 9, 30])
def test_what_a_tree_derives_from_its_parents(nodes):
    tree = Tree(random_parents(nodes, nodes))
    parents = tree.parents.tolist()
    assert tree.size == nodes and tree.depth.shape == (nodes + 1,) and tree.ancestors.shape == (nodes + 1, nodes + 1)
    for node in range(-1, nodes):
        path = lineage(parents, node)
        assert tree.depth[node + 1] == len(path)
        assert tree.path_to(node + 1).tolist() == path
        seen = torch.zeros(nodes + 1, dtype=torch.bool)
        seen[[0, *(m + 1 for m in path)]] = True
        assert torch.equal(tree.ancestors[node + 1], seen)
        children = [m for m in range(nodes) if parents[m] == node]
        assert [m for m in tree.children[node + 1].tolist() if m >= 0] == children
        assert tree.rank[children].tolist() == list(range(len(children)))
    assert tree.height == max(tree.depth.tolist())
    assert tree.width == max([0, *(parents.count(m) for m in range(-1, nodes))])


def test_one_shape_a_row_is_the_rows_shapes_side_by_side():
    rows = [random_parents(8, seed) for seed in range(4)]
    batch = Tree(torch.stack(rows))
    for row, parents in enumerate(rows):
        tree = Tree(parents)
        assert torch.equal(batch.depth[row], tree.depth) and torch.equal(batch.ancestors[row], tree.ancestors)
        assert torch.equal(batch.rank[row], tree.rank)
    assert batch.height == max(Tree(p).height for p in rows) and batch.width == max(Tree(p).width for p in rows)
    assert batch.to("cpu").height == batch.height
    with pytest.raises(InputError, match="share"):
        batch.path_to(1)


@pytest.mark.parametrize(
    "parents",
    [torch.tensor([0]), torch.tensor([-1, 1]), torch.tensor([-2]), torch.tensor([-1.0]), torch.zeros(1, 1, 1)],
)
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(InputError):
        Tree(parents)


def test_plain_shapes():
    assert trees.chain(3).parents.tolist() == [-1, 0, 1]
    assert trees.chain(0).size == 0
    assert trees.full((2, 2)).parents.tolist() == [-1, -1, 0, 0, 1, 1]
    assert trees.full((1, 1, 1)).parents.tolist() == trees.chain(3).parents.tolist()
    cube = trees.full((3,) * 3)
    assert cube.size == 3 + 9 + 27 and cube.height == 3 and cube.width == 3
    with pytest.raises(ConfigError):
        trees.full((2, 0))


def expected_accepted(tree, chances):
    """Σ over nodes of the product of the chances along its path; chances(depth, rank)."""
    parents, total = tree.parents.tolist(), 0.0
    for node in range(tree.size):
        product = 1.0
        for depth, m in enumerate(lineage(parents, node)):
            product *= chances(depth, int(tree.rank[m]))
        total += product
    return total


def all_trees(nodes):
    """Every parents list in which parents do not decrease: all shapes, in breadth-first order."""
    for parents in itertools.product(*(range(-1, m) for m in range(nodes))):
        if list(parents) == sorted(parents):
            yield Tree(torch.tensor(parents))


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("p", [[0.6, 0.2, 0.1], [0.9, 0.05], [0.3, 0.25, 0.2, 0.15], [0.2, 0.5, 0.1]])
def test_sequoia_is_the_best_of_all_trees(p, depth):
    for nodes in (1, 3, 5):
        tree = trees.sequoia(p, nodes, depth)
        assert tree.height <= depth and tree.size <= nodes

        def chances(_, rank):
            return p[rank] if rank < len(p) else 0.0

        best = max(
            expected_accepted(t, chances)
            for n in range(1, nodes + 1)
            for t in all_trees(n)
            if t.height <= depth and t.width <= len(p)
        )
        assert expected_accepted(tree, chances) == pytest.approx(best)


def test_sequoia_uses_its_budget_and_no_more_levels_than_allowed():
    p = [0.7 / (rank + 1) ** 1.5 for rank in range(8)]
    tree = trees.sequoia(p, nodes=64, depth=6)
    assert tree.size == 64 and tree.height <= 6 and tree.width <= 8
    assert tree.depth[1:].tolist() == sorted(tree.depth[1:].tolist())  # breadth first
    assert trees.sequoia([0.5], nodes=10, depth=4).parents.tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("nodes", [1, 3, 5])
def test_medusa_tree_is_the_best_of_all_trees(nodes):
    accuracies = [[0.6, 0.2, 0.1], [0.5, 0.2], [0.4, 0.3]]

    def chances(depth, rank):
        return accuracies[depth][rank] if depth < 3 and rank < len(accuracies[depth]) else 0.0

    tree = trees.medusa_tree(accuracies, nodes)
    best = max(expected_accepted(t, chances) for t in all_trees(nodes))
    assert tree.size == nodes and expected_accepted(tree, chances) == pytest.approx(best)
    assert trees.medusa_tree(accuracies, 1000).size == 3 + 6 + 12


def test_bad_shapes_are_refused():
    for call in (
        lambda: trees.sequoia([0.5], 0, 1),
        lambda: trees.sequoia([], 3, 1),
        lambda: trees.sequoia([1.5], 3, 1),
        lambda: trees.medusa_tree([], 3),
        lambda: trees.best_first_block(torch.ones(1, 1, 2), 0),
    ):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(InputError):
        trees.best_first_block(torch.ones(2, 3), 4)


def test_eagle2_expands_the_likeliest_paths():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, generator=generator)
    children = torch.randn(3, 4, 5, generator=generator).log_softmax(-1)
    best, under, which = trees.eagle2_expand(scores, children, 6)
    for row in range(3):
        paths = sorted((float(scores[row, w] + children[row, w, c]), w, c) for w in range(4) for c in range(5))[::-1]
        assert [(w, c) for _, w, c in paths[:6]] == list(zip(under[row].tolist(), which[row].tolist(), strict=True))
        assert best[row].tolist() == pytest.approx([value for value, _, _ in paths[:6]])
    assert trees.eagle2_expand(scores, children, 100)[0].shape == (3, 20)


def random_scored_tree(rows, nodes, seed):
    """Parents and cumulative log-probabilities; some steps are certain, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.stack([random_parents(nodes, seed * 100 + row) for row in range(rows)])
    steps = -torch.rand(rows, nodes, generator=generator)
    steps[torch.rand(rows, nodes, generator=generator) < 0.3] = 0
    scores = torch.zeros(rows, nodes)
    for row in range(rows):
        for node in range(nodes):
            above = parents[row, node]
            scores[row, node] = steps[row, node] + (scores[row, above] if above >= 0 else 0)
    return scores, parents


@pytest.mark.parametrize("kept", [1, 4, 9, 20])
def test_selection_keeps_the_best_nodes_and_stays_a_tree(kept):
    scores, parents = random_scored_tree(6, 12, kept)
    index, new_parents = trees.eagle2_select(scores, parents, kept)
    assert index.shape == (6, min(kept, 12))
    for row in range(6):
        chosen = index[row].tolist()
        assert chosen == sorted(chosen)
        best = scores[row].sort(descending=True).values[: len(chosen)]
        assert torch.equal(scores[row, chosen].sort(descending=True).values, best)
        for place, node in enumerate(chosen):
            above = int(parents[row, node])
            assert int(new_parents[row, place]) == (chosen.index(above) if above >= 0 else -1)
    same_index, same_parents, expected = trees.opt_tree(scores, parents, kept)
    assert torch.equal(index, same_index) and torch.equal(new_parents, same_parents)
    assert torch.allclose(expected, scores.gather(1, index).exp().sum(1))


@pytest.mark.parametrize("nodes", [1, 3, 8, 40])
def test_a_block_of_distributions_yields_its_likeliest_paths(nodes):
    q = (1.5 * torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(nodes))).softmax(-1)
    tokens, tree, scores = trees.best_first_block(q, nodes)
    for row in range(5):
        paths = {}
        for length in (1, 2, 3):
            for path in itertools.product(range(4), repeat=length):
                paths[path] = float(torch.stack([q[row, i, t] for i, t in enumerate(path)]).log().sum())
        best = sorted(paths.values(), reverse=True)[:nodes]
        parents = tree.parents[row].tolist()
        drafted = [tuple(int(tokens[row, m]) for m in lineage(parents, node)) for node in range(tree.size)]
        assert len(set(drafted)) == tree.size == min(nodes, len(paths))
        assert sorted((paths[path] for path in drafted), reverse=True) == pytest.approx(best, abs=1e-5)
        assert scores[row].tolist() == pytest.approx([paths[path] for path in drafted], abs=1e-5)
    assert int(Tree(tree.parents).height) <= tree.height and int(Tree(tree.parents).width) <= tree.width


def test_dynamic_shapes_do_not_wait_for_the_device():
    q = torch.rand(2, 3, 9, device="meta")
    tokens, tree, _ = trees.best_first_block(q, 5)
    assert tree.depth.shape == (2, 6) and tree.ancestors.shape == (2, 6, 6) and tree.children.shape == (2, 6, 5)
    walk_deterministic(tokens, tree.parents, tokens.new_zeros(2, 6), depth=tree.height)


def test_a_block_tree_is_walked_by_the_targets_tokens():
    """Drafted from a block whose argmaxes the target agrees with, the whole greedy path is accepted."""
    q = (3 * torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))).softmax(-1)
    tokens, tree, _ = trees.best_first_block(q, 10)
    greedy = q.argmax(-1)
    after = torch.nn.functional.pad(greedy, (0, 1))  # what the target says after 0, 1, 2, 3 tokens
    path, accepted, _ = walk_deterministic(tokens, tree.parents, after.gather(1, tree.depth), depth=tree.height)
    for row in range(4):
        count = int(accepted[row])
        assert tokens[row, path[row, :count]].tolist() == greedy[row, :count].tolist()
    assert int(accepted.sum()) > 4
