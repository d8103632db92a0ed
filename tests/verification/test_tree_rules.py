"""Tree walks and traversal: exact with and without replacement, for shapes shared and per row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gtest import g_test
from verification.enumerable import (
    FAILS,
    ROWS,
    complete,
    draw_chain,
    draw_tree,
    random_model,
    sequence_probs,
    tree_fit,
)
from verification.wrong_rules import WRONG_FOR_TREES

from polyspec import verification as v
from polyspec.errors import InputError
from polyspec.trees import Tree

BOTH = {"recursive": partial(v.walk_recursive, children=3), "traversal": v.traversal_verification}
SHAPES = {
    "chain": [-1, 0],
    "breadth first": [-1, -1, 0, 0, 1, 1],
    "depth first, uneven": [-1, 0, 0, -1, 3, -1],
}


@pytest.mark.parametrize("rule", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_has_the_targets_distribution(rule, shape, replacement):
    model = random_model(2, vocab=4, length=2)
    p_value, _ = tree_fit(rule, model, SHAPES[shape], seed=0, replacement=replacement, depth=2)
    assert p_value > FAILS


@pytest.mark.parametrize("rule", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("replacement", [False, True])
def test_zeros_and_missing_nodes_keep_it_exact(rule, replacement):
    model = random_model(1, vocab=4, length=2, sparse=True)
    p_value, _ = tree_fit(rule, model, [-1, -1, -1, 0, 0, 1], seed=0, replacement=replacement, depth=2)
    assert p_value > FAILS


@pytest.mark.parametrize("rule", BOTH.values(), ids=BOTH)
def test_three_levels_are_exact(rule):
    model = random_model(3, vocab=3, length=3)
    p_value, _ = tree_fit(rule, model, [-1, 0, 1, 1, -1, 4, 5, 4], seed=0, depth=3)
    assert p_value > FAILS


@pytest.mark.parametrize("walk", WRONG_FOR_TREES, ids=lambda rule: rule.__name__)
def test_wrong_walks_fail_the_same_test(walk):
    p_value, _ = tree_fit(walk, random_model(2, vocab=4, length=2), SHAPES["breadth first"], seed=0)
    assert p_value < FAILS


def follow_samples(tokens, parents, node_q, target_probs, *, depth=None, generator):
    drawn = torch.multinomial(target_probs.flatten(0, 1), 1, generator=generator).view(len(tokens), -1)
    return v.walk_deterministic(tokens, parents, drawn, depth=depth)


@pytest.mark.parametrize("shape", SHAPES)
def test_following_the_targets_own_draws_is_exact_for_any_tree(shape):
    p_value, _ = tree_fit(follow_samples, random_model(2, vocab=4, length=2), SHAPES[shape], seed=0)
    assert p_value > FAILS


def draw_greedy_plus_one(model, rows, generator):
    """A full binary tree of depth 2 whose nodes have the likeliest token and one draw from the rest as children."""
    prefix, tokens, q, p = torch.zeros(rows, 1, dtype=torch.long), [], [], []
    for step in range(2):
        q.append(model.draft[step][prefix])
        p.append(model.target[step][prefix])
        pair = v.greedy_plus_one_draft(q[-1], 2, generator=generator)
        tokens.append(pair.flatten(1))
        prefix = (prefix.unsqueeze(-1) * model.vocab + pair).flatten(1)
    p.append(model.target[2][prefix])
    q.append(torch.full_like(p[-1], 1 / model.vocab))
    return torch.cat(tokens, 1), torch.cat(q, 1), torch.cat(p, 1)


def test_a_tree_of_greedy_plus_one_candidates_is_exact_and_beats_following():
    model, shape = random_model(2, vocab=4, length=2), Tree(torch.tensor([-1, -1, 0, 0, 1, 1]))
    generator = torch.Generator().manual_seed(0)
    tokens, q, p = draw_greedy_plus_one(model, ROWS, generator)
    emitted = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(ROWS, 7)
    _, follow, _ = v.walk_deterministic(tokens, shape.parents, emitted, depth=2)
    for node in range(3):
        candidates = tokens[:, shape.children[node]]
        emitted[:, node] = v.greedy_plus_one(p[:, node], candidates, q[:, node], generator=generator).next_token
    path, accepted, token = v.walk_deterministic(tokens, shape.parents, emitted, depth=2)
    kept = torch.where(path >= 0, tokens.gather(1, path.clamp(min=0)), 0)
    sequences = complete(model, kept, accepted, token, generator)
    assert g_test(torch.bincount(sequences, minlength=64), sequence_probs(model)) > FAILS
    assert float(accepted.float().mean()) > float(follow.float().mean()) + 4 / ROWS**0.5


def test_recursive_rejection_accepts_more_than_following_and_traversal_more_still():
    model = random_model(11, vocab=4, length=2)
    shape = SHAPES["breadth first"]
    _, follow = tree_fit(follow_samples, model, shape, seed=0, depth=2)
    _, recursive = tree_fit(BOTH["recursive"], model, shape, seed=0, depth=2)
    _, traversal = tree_fit(v.traversal_verification, model, shape, seed=0, depth=2)
    noise = 4 / ROWS**0.5
    assert follow < recursive - noise and recursive < traversal + noise


@pytest.mark.parametrize("seed", range(2))
def test_on_a_chain_traversal_is_block_verification_and_the_walk_is_speculative_sampling(seed):
    model = random_model(seed, vocab=4, length=3)
    _, walk = tree_fit(v.walk_recursive, model, [-1, 0, 1], seed=0, depth=3, children=1)
    _, traversal = tree_fit(v.traversal_verification, model, [-1, 0, 1], seed=0, depth=3)
    tokens, q, p = draw_chain(model, ROWS, torch.Generator().manual_seed(1))
    chain = float(v.speculative_sampling(tokens, q, p).accepted.float().mean())
    block = float(v.block_verification(tokens, q, p).accepted.float().mean())
    assert abs(walk - chain) < 8 / ROWS**0.5 and abs(traversal - block) < 8 / ROWS**0.5


def random_trees(rows, nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    parents = torch.zeros(rows, nodes, dtype=torch.long)
    for m in range(nodes):
        parents[:, m] = torch.randint(-1, m, (rows,), generator=generator)
    tokens = torch.randint(3, (rows, nodes), generator=generator)
    tokens[torch.rand(rows, nodes, generator=generator) < 0.1] = -1
    target = torch.randint(3, (rows, nodes + 1), generator=generator)
    return tokens, parents, target


def walk_by_hand(tokens, parents, target):
    here, path = -1, []
    while True:
        below = [m for m in range(len(tokens)) if parents[m] == here and tokens[m] == target[here + 1]]
        if not below:
            return path, target[here + 1]
        here = below[0]
        path.append(here)


@pytest.mark.parametrize("nodes", [0, 1, 2, 5, 13])
def test_the_deterministic_walk_does_what_a_loop_does(nodes):
    tokens, parents, target = random_trees(300, nodes, nodes)
    path, accepted, next_token = v.walk_deterministic(tokens, parents, target)
    assert path.shape == (300, nodes)
    for row in range(300):
        expected, token = walk_by_hand(tokens[row].tolist(), parents[row].tolist(), target[row].tolist())
        assert path[row, : len(expected)].tolist() == expected and bool((path[row, len(expected) :] == -1).all())
        assert int(accepted[row]) == len(expected) and int(next_token[row]) == token


def test_the_width_of_the_path_is_the_depth_asked_for():
    tokens, parents, target = random_trees(50, 6, 0)
    assert v.walk_deterministic(tokens, parents, target, depth=9)[0].shape == (50, 9)
    shallow = torch.tensor([-1, -1, 0, 0, 1, 1])
    narrow = v.walk_deterministic(tokens, shallow, target, depth=2)
    wide = v.walk_deterministic(tokens, shallow, target)
    assert torch.equal(narrow[0], wide[0][:, :2]) and torch.equal(narrow[2], wide[2])


def test_shapes_that_differ_by_row_give_the_same_law_as_one_by_one():
    model = random_model(2, vocab=4, length=2)
    generator = torch.Generator().manual_seed(0)
    first, second = [-1, -1, 0, 0, 1, 1], [-1, 0, 0, -1, 3, 3]
    for rule in BOTH.values():
        means = []
        drawn = [draw_tree(model, shape, ROWS // 5, generator, replacement=False) for shape in (first, second)]
        for shape, (tokens, q, p) in zip((first, second), drawn, strict=True):
            means.append(float(rule(tokens, torch.tensor(shape), q, p, depth=2, generator=generator)[1].float().mean()))
        tokens, q, p = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        parents = torch.tensor([first, second]).repeat_interleave(ROWS // 5, 0)
        mixed = rule(tokens, parents, q, p, depth=2, generator=generator)[1].float().view(2, -1).mean(1)
        assert abs(float(mixed[0]) - means[0]) < 0.02 and abs(float(mixed[1]) - means[1]) < 0.02


def test_given_bounds_on_depth_and_children_change_nothing():
    model = random_model(2, vocab=4, length=2)
    tokens, q, p = draw_tree(
        model, SHAPES["depth first, uneven"], 500, torch.Generator().manual_seed(0), replacement=False
    )
    parents = torch.tensor(SHAPES["depth first, uneven"])
    bounded = v.walk_recursive(tokens, parents, q, p, depth=2, children=3, generator=torch.Generator().manual_seed(1))
    assert bounded[0].shape == (500, 2)
    assert int(bounded[1].max()) == 2


def test_a_tree_without_nodes_draws_from_the_target():
    p = torch.tensor([[[0.0, 1.0, 0.0]]]).expand(4, 1, 3)
    empty, parents = torch.zeros(4, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    for rule in (v.walk_recursive, v.traversal_verification):
        path, accepted, token = rule(empty, parents, p, p)
        assert path.shape == (4, 0) and accepted.tolist() == [0] * 4 and token.tolist() == [1] * 4


def test_ill_shaped_trees_are_refused():
    tokens, p = torch.zeros(2, 3, dtype=torch.long), torch.full((2, 4, 5), 0.2)
    with pytest.raises(InputError, match="parents"):
        v.walk_recursive(tokens, torch.zeros(2, dtype=torch.long), p, p)
    with pytest.raises(InputError, match="node probabilities"):
        v.traversal_verification(tokens, torch.tensor([-1, 0, 1]), p[:, :3], p)
    with pytest.raises(InputError, match="target_tokens"):
        v.walk_deterministic(tokens, torch.tensor([-1, 0, 1]), torch.zeros(2, 3, dtype=torch.long))
