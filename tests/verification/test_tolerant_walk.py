"""A tree's walk with a tolerance follows its formula, node by node."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from gtest import g_test
from verification.enumerable import FAILS

from polyspec import verification as v
from polyspec.errors import ConfigError
from polyspec.verification import tolerant_walk as rules

V, ROWS, TAU = 4, 40_000, 2
TOKENS, PARENTS = [0, 1, 2, 3, 0], [-1, -1, 0, 0, 2]  # a node with two children; one of them has a child


def nodes_p() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(TOKENS) + 1, V, generator=generator, dtype=torch.float64).softmax(-1)


def deepest(good: list[bool]) -> list[int]:
    """The longest path of good nodes, the first of several."""
    best: list[int] = []
    for node in range(len(TOKENS)):
        path, at = [], node
        while at >= 0:
            path, at = [at, *path], PARENTS[at]
        if all(good[n] for n in path) and len(path) > len(best):
            best = path
    return best


def law(p: torch.Tensor) -> dict[tuple[tuple[int, ...], int], float]:
    """Probability of each (path, next token) by enumerating two draws at every place where they matter."""
    found: dict[tuple[tuple[int, ...], int], float] = {}
    places = [0, 1, 3]  # the root, node 0 and node 2 have children; at a leaf the first draw alone counts
    for draws in product(product(range(V), repeat=TAU), repeat=len(places)):
        weight = 1.0
        for place, drawn in zip(places, draws, strict=True):
            for token in drawn:
                weight *= float(p[place, token])
        at = dict(zip(places, draws, strict=True))
        path = deepest([TOKENS[n] in at[PARENTS[n] + 1] for n in range(len(TOKENS))])
        end = path[-1] + 1 if path else 0
        for token in range(V):
            share = float(p[end, token]) if end not in at else float(at[end][0] == token)
            key = (tuple(path), token)
            found[key] = found.get(key, 0.0) + weight * share
    return found


def walked(p: torch.Tensor, **knobs) -> list[tuple[tuple[int, ...], int]]:
    tokens = torch.tensor(TOKENS).expand(ROWS, -1)
    path, accepted, token = v.walk_tolerant(
        tokens,
        torch.tensor(PARENTS),
        None,
        p.float().expand(ROWS, -1, -1),
        depth=3,
        generator=torch.Generator().manual_seed(0),
        **knobs,
    )
    assert torch.equal(accepted, (path >= 0).sum(1))
    return [(tuple(n for n in row if n >= 0), t) for row, t in zip(path.tolist(), token.tolist(), strict=True)]


def fit(found: list, expected: dict) -> float:
    keys = sorted(set(expected) | set(found))
    counts = dict.fromkeys(keys, 0)
    for one in found:
        counts[one] += 1
    return g_test([counts[k] for k in keys], [expected.get(k, 0.0) for k in keys])


def test_paths_and_next_tokens_have_the_law_of_the_formula() -> None:
    p = nodes_p()
    expected = law(p)
    assert abs(sum(expected.values()) - 1) < 1e-9
    assert fit(walked(p, tolerance=partial(rules.samples, tolerance=TAU)), expected) > FAILS
    for other in (1, 3):
        assert fit(walked(p, tolerance=partial(rules.samples, tolerance=other)), expected) < FAILS


def test_with_one_draw_the_first_token_is_the_targets() -> None:
    p = nodes_p()
    for tolerance, exact in ((1, True), (3, False)):
        first = [
            TOKENS[path[0]] if path else t
            for path, t in walked(p, tolerance=partial(rules.samples, tolerance=tolerance))
        ]
        assert (g_test(torch.tensor(first).bincount(minlength=V), p[0]) > FAILS) == exact


def test_likely_children_are_accepted_by_topk_and_by_typicality() -> None:
    p = torch.tensor([[0.05, 0.6, 0.3, 0.05], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4], *[[0.25] * 4] * 3])
    for rule, first in ((partial(rules.topk, tolerance=1), 1), (partial(rules.typical, tolerance=0.5), 1)):
        paths = {path for path, _ in walked(p, tolerance=rule)}
        assert paths == {(first,)}
    assert {path for path, _ in walked(p, tolerance=partial(rules.topk, tolerance=4))} == {(0, 2, 4)}


def test_bad_tolerances_are_refused() -> None:
    for rule in (
        partial(rules.samples, tolerance=0),
        partial(rules.topk, tolerance=0),
        partial(rules.typical, tolerance=2),
    ):
        with pytest.raises(ConfigError, match="tolerance"):
            walked(nodes_p(), tolerance=rule)
