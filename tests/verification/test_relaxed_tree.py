"""DARE's walk: the longest branch of allowed tokens, against the definition node by node; wrong variants are caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polyspec import verification as v
from polyspec.errors import ConfigError, InputError
from polyspec.verification import topk_threshold as module

ROWS, NODES, VOCAB = 40, 9, 5


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random trees, some nodes missing, and sharp enough distributions: (tokens, parents, target_tokens, target_probs)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, VOCAB, (ROWS, NODES), generator=generator)
    parents = torch.stack([torch.randint(-1, m, (ROWS,), generator=generator) for m in range(NODES)], dim=1)
    probs = (2 * torch.randn(ROWS, NODES + 1, VOCAB, generator=generator)).softmax(-1)
    return tokens, parents, probs.argmax(-1), probs


def allowed(p: Tensor, k: int, threshold: float) -> set[int]:
    best = sorted(range(VOCAB), key=lambda token: -float(p[token]))
    return {token for token in best[:k] if p[token] > threshold} or {best[0]}


def reference(tokens: Tensor, parents: Tensor, probs: Tensor, k: int, threshold: float) -> tuple[list[int], int]:
    """One row: the nodes of the longest branch of allowed tokens, the first of several, and the argmax at its end."""
    longest: list[int] = []
    for node in range(NODES):
        branch = [node]
        while parents[branch[0]] >= 0:
            branch.insert(0, int(parents[branch[0]]))
        fine = all(int(tokens[m]) in allowed(probs[int(parents[m]) + 1], k, threshold) for m in branch)
        if fine and len(branch) > len(longest):
            longest = branch
    end = longest[-1] + 1 if longest else 0
    return longest, int(probs[end].argmax())


def agrees(walk: Callable[..., tuple[Tensor, Tensor, Tensor]], k: int, threshold: float, seeds: range = range(6)) -> bool:
    for seed in seeds:
        tokens, parents, target_tokens, probs = inputs(seed)
        path, accepted, token = walk(tokens, parents, target_tokens, probs, k=k, threshold=threshold)
        for row in range(ROWS):
            found = (path[row, : int(accepted[row])].tolist(), int(token[row]))
            if found != reference(tokens[row], parents[row], probs[row], k, threshold):
                return False
            if (path[row, int(accepted[row]) :] != -1).any():
                return False
    return True


@pytest.mark.parametrize(("k", "threshold"), [(1, 0.0), (2, 0.1), (3, 0.05), (2, 0.9), (9, 0.0), (9, 0.15)])
def test_the_walk_is_its_definition(k: int, threshold: float) -> None:
    assert agrees(v.walk_topk_threshold, k, threshold)


def without_the_threshold(*given: Tensor, k: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    return v.walk_topk_threshold(*given, k=k, threshold=0.0)


def with_one_more(*given: Tensor, k: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    return v.walk_topk_threshold(*given, k=k + 1, threshold=threshold)


def judged_by_the_next_node(tokens: Tensor, parents: Tensor, chosen: Tensor, probs: Tensor, **knobs: float) -> tuple:
    shifted = torch.cat([probs[:, 1:], probs[:, -1:]], dim=1)
    return v.walk_topk_threshold(tokens, parents, chosen, shifted, **knobs)


def along_the_targets_own(tokens: Tensor, parents: Tensor, chosen: Tensor, probs: Tensor, **knobs: float) -> tuple:
    return v.walk_deterministic(tokens, parents, chosen)


@pytest.mark.parametrize("walk", [without_the_threshold, with_one_more, judged_by_the_next_node, along_the_targets_own])
def test_wrong_walks_fail_the_same_test(walk: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    assert not agrees(walk, 2, 0.1)


def test_a_branch_whose_ancestor_is_not_allowed_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_walk(), "reached", lambda passable, parents, depth: passable)
    assert not agrees(v.walk_topk_threshold, 2, 0.1)


def test_a_shorter_branch_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(reachable: Tensor, parents: Tensor, depth: int) -> Tensor:
        return torch.where(reachable.any(1), reachable.long().argmax(1) + 1, 0)

    monkeypatch.setattr(module_of_walk(), "deepest", first)
    assert not agrees(v.walk_topk_threshold, 2, 0.1)


def module_of_walk() -> object:
    import sys

    return sys.modules[module.__module__]


@pytest.mark.parametrize("seed", range(4))
def test_with_k_1_the_walk_follows_whatever_the_target_chose(seed: int) -> None:
    tokens, parents, _, probs = inputs(seed)
    drawn = torch.multinomial(probs.flatten(0, 1), 1).view(ROWS, -1)
    expected = v.walk_deterministic(tokens, parents, drawn)
    for flat in (probs, torch.full_like(probs, 1 / VOCAB)):  # even where all tie
        found = v.walk_topk_threshold(tokens, parents, drawn, flat, k=1, threshold=0.0)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


def test_a_chain_is_judged_as_by_the_rule_for_chains() -> None:
    tokens, _, target_tokens, probs = inputs(0)
    tokens = tokens.clamp(min=0)
    chain = torch.arange(-1, NODES - 1)
    _, accepted, token = v.walk_topk_threshold(tokens, chain, target_tokens, probs, depth=NODES)
    verdict = v.topk_threshold(tokens, None, probs)
    assert torch.equal(accepted, verdict.accepted) and torch.equal(token, verdict.next_token)


def test_wrong_inputs_are_named() -> None:
    tokens, parents, target_tokens, probs = inputs(0)
    with pytest.raises(InputError, match="target_tokens must be"):
        v.walk_topk_threshold(tokens, parents, target_tokens[:, 1:], probs)
    with pytest.raises(InputError, match="node probabilities"):
        v.walk_topk_threshold(tokens, parents, target_tokens, probs[:, 1:])
    for knobs in ({"k": 0}, {"threshold": 1.5}, {"depth": -1}):
        with pytest.raises(ConfigError):
            v.walk_topk_threshold(tokens, parents, target_tokens, probs, **knobs)
