"""The trie answers what a dictionary of prefixes would."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from polyspec.errors import InputError
from polyspec.trie import Trie


def random_sequences(count: int = 200, depth: int = 4, codes: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, codes, (count, depth))


def below(trie: Trie, width: int, alive: torch.Tensor | None = None) -> dict[tuple[int, ...], set[int]]:
    """Every prefix the trie knows and the tokens that may follow it, found level by level."""
    found, level = {}, {(): 0}
    while level:
        nodes = torch.tensor([list(level.values())])
        child, exists = trie.children(nodes, width, alive)
        new = {}
        for prefix, children, there in zip(level, child[0].tolist(), exists[0].tolist(), strict=True):
            real = [c for c, e in zip(children, there, strict=True) if e]
            found[prefix] = {int(trie.token[c]) for c in real}
            new |= {(*prefix, int(trie.token[c])): c for c in real}
        level = new
    return found


def reference(rows: list[list[int]]) -> dict[tuple[int, ...], set[int]]:
    found: dict[tuple[int, ...], set[int]] = {(): set()}
    for row in rows:
        for i, token in enumerate(row):
            found.setdefault(tuple(row[:i]), set()).add(token)
        found.setdefault(tuple(row), set())
    return found


@pytest.mark.parametrize(("count", "depth", "codes"), [(1, 1, 1), (5, 3, 2), (200, 4, 7), (50, 1, 100), (300, 5, 2)])
def test_children_are_those_of_a_dictionary_of_prefixes(count, depth, codes):
    rows = random_sequences(count, depth, codes)
    trie = Trie.build(rows)
    assert below(trie, max(trie.widths)) == reference(rows.tolist())
    assert trie.depth == depth
    assert trie.widths[0] == len({r[0] for r in rows.tolist()})


def test_a_path_spells_its_sequence_and_equal_sequences_end_in_one_node():
    rows = random_sequences(100, 3, 3)
    trie = Trie.build(rows)
    assert (trie.token[trie.path].numpy() == rows).all()
    assert (trie.parent[trie.path[:, 1:]] == trie.path[:, :-1]).all()
    same = {tuple(r) for r in rows.tolist()}
    assert len(trie.leaf.unique()) == len(same)


def test_what_is_alive_is_what_leads_to_something_allowed():
    rows = random_sequences(80, 4, 3)
    trie = Trie.build(rows)
    allowed = torch.rand(3, 80, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.05], [0.5], [0.0]])
    alive = trie.alive(allowed)
    for row in range(3):
        kept = [r for r, a in zip(rows.tolist(), allowed[row].tolist(), strict=True) if a]
        found = below(trie, max(trie.widths), alive[row : row + 1])
        assert found == reference(kept)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no sequences": (lambda: Trie.build(np.zeros((0, 3), int)), "neither empty"),
    "no tokens": (lambda: Trie.build(np.zeros((3, 0), int)), "neither empty"),
    "fractions": (lambda: Trie.build([[0.5, 1.0]]), "whole numbers"),
    "one sequence without its axis": (lambda: Trie.build([1, 2]), "whole numbers"),
    "sequences of different lengths": (lambda: Trie.build([[1, 2], [3]]), "one length"),
    "negative tokens": (lambda: Trie.build([[0, -1]]), "≥ 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_set_of_sequences_is_refused(case):
    attempt, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        attempt()
