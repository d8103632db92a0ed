"""N-to-K verification: the strict rule returns the target's own list, the relaxed one what its paper says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gtest import g_test

from polyspec import verification as v
from polyspec.errors import ConfigError, InputError, PolyspecError

ROWS = 60_000


def test_the_strict_rule_returns_the_best_whatever_was_drafted():
    scores = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for n in (0, 1, 10):
        drafted = torch.stack([torch.randperm(30)[:n] for _ in range(40)])
        found = v.strict_topk(drafted, None, scores, k=4)
        assert found.chosen.equal(scores.topk(4).indices)
        there = (found.chosen[:, :, None] == drafted[:, None, :]).any(2)
        assert ((found.source >= 0) == there).all()
        assert found.accepted.equal(there.all(1))
        if n:
            picked = drafted.gather(1, found.source.clamp(min=0))
            assert (picked == found.chosen)[there].all()


def test_the_strict_rule_goes_on_if_all_that_exist_were_drafted():
    scores = torch.tensor([[0.0, -torch.inf, 2.0, 1.0], [-torch.inf] * 4, [3.0, 2.0, 1.0, 0.0]])
    drafted = torch.tensor([[2, 3, 0, -1], [0, 1, 2, 3], [0, 1, -1, -1]])
    found = v.strict_topk(drafted, None, scores, k=torch.tensor([4, 4, 2]), most=5)
    assert found.chosen.tolist() == [[2, 3, 0, -1, -1], [-1] * 5, [0, 1, -1, -1, -1]]
    assert found.source.tolist() == [[0, 1, 2, -1, -1], [-1] * 5, [0, 1, -1, -1, -1]]
    assert found.accepted.tolist() == [True, False, True]  # a row without candidates has nowhere to go on


def without_replacement(p: torch.Tensor, k: int) -> torch.Tensor:
    """The distribution of ordered draws of k out of `p [C]`, `[C] * k`."""
    table = np.zeros([len(p)] * k)
    for order in itertools.permutations(range(len(p)), k):
        left, chance = 1.0, 1.0
        for i in order:
            chance *= float(p[i]) / left
            left -= float(p[i])
        table[order] = chance
    return torch.from_numpy(table)


P = torch.tensor([0.1, 0.35, 0.05, 0.3, 0.2])
Q = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.2])


def relaxed(drafted: list[int], q: torch.Tensor | None, k: int, p: torch.Tensor = P) -> v.TopK:
    tokens = torch.tensor([drafted], dtype=torch.long).expand(ROWS, -1)
    probs = None if q is None else q.expand(ROWS, -1)
    generator = torch.Generator().manual_seed(3)
    return v.relaxed_topk(tokens, probs, p.log().expand(ROWS, -1), k=k, generator=generator)


def counts(chosen: torch.Tensor, size: int = len(P)) -> torch.Tensor:
    index = torch.zeros(len(chosen), dtype=torch.long)
    for column in chosen.unbind(1):
        index = index * size + column
    return index.bincount(minlength=size ** chosen.shape[1])


def test_with_nothing_drafted_the_relaxed_rule_draws_from_the_target_without_replacement():
    found = relaxed([], None, 2)
    assert not found.accepted.any() and (found.source < 0).all()
    assert g_test(counts(found.chosen), without_replacement(P, 2)) > 1e-6


def test_the_relaxed_rule_keeps_each_draft_with_probability_p_over_q_and_goes_on_with_enough():
    keep = (P / Q).clamp(max=1)
    drafted, k = [0, 1, 2], 2
    found = relaxed(drafted, Q, k)
    # enough: at least 2 of 3 independent tests pass; candidate 1 always does
    enough = 1 - (1 - keep[0]) * (1 - keep[2])
    assert g_test([int(found.accepted.sum()), int((~found.accepted).sum())], [enough, 1 - enough]) > 1e-6
    both = found.chosen[found.accepted].sort(1).values
    sets = {(0, 1): 0.0, (0, 2): 0.0, (1, 2): 0.0}  # which two of the kept go on: all pairs of them alike
    for a, c in itertools.product((False, True), repeat=2):
        chance = (keep[0] if a else 1 - keep[0]) * (keep[2] if c else 1 - keep[2])
        kept = [i for i, there in ((0, a), (1, True), (2, c)) if there]
        pairs = list(itertools.combinations(kept, 2))
        for pair in pairs:
            sets[pair] += float(chance) / len(pairs)
    seen = [int((both == torch.tensor(pair)).all(1).sum()) for pair in sets]
    assert g_test(seen, list(sets.values())) > 1e-6
    assert (found.source[found.accepted] >= 0).all()


def test_the_relaxed_rule_fills_up_from_the_residual():
    found = relaxed([0], Q, 2)  # kept with probability 1/4
    assert not found.accepted.any()
    residual = (P - Q).clamp(min=0)
    residual = residual / residual.sum()
    table = without_replacement(residual, 2)[: len(P), : len(P)] * 0.75
    table[0] += 0.25 * residual
    assert g_test(counts(found.chosen), table) > 1e-6
    assert (found.source[:, 0] == torch.where(found.chosen[:, 0] == 0, 0, -1)).all()


def test_where_drafter_and_target_agree_every_relaxed_step_goes_on():
    found = relaxed([3, 0, 4], P, 2)
    assert found.accepted.all()
    drafted = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    assert g_test(counts(found.chosen), without_replacement(drafted / 3, 2)) > 1e-6


def test_the_relaxed_list_is_short_only_where_candidates_are():
    p = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0])
    found = relaxed([0], Q, 4, p)
    assert (found.chosen[:, :2].sort(1).values == torch.tensor([0, 2])).all()
    assert (found.chosen[:, 2:] == -1).all()
    everything = relaxed([0, 2], p, 4, p)
    assert everything.accepted.all()


def test_the_best_of_those_kept_stand_where_that_is_asked_for():
    scores = P.log().expand(ROWS, -1)
    likeliest = P.topk(2).indices
    nothing = torch.empty(ROWS, 0, dtype=torch.long)
    assert (v.relaxed_topk(nothing, None, scores, k=2, best=True).chosen == likeliest).all()
    # drafts that no test can fail, in any order: the published rule takes two of them at random
    tokens = torch.arange(len(P)).flip(0).expand(ROWS, -1)
    generator = torch.Generator().manual_seed(3)
    found = v.relaxed_topk(tokens, scores.exp(), scores, k=2, best=True, generator=generator)
    assert found.accepted.all() and (found.chosen == likeliest).all()
    assert not (relaxed(list(range(len(P))), P, 2).chosen == likeliest).all()


@pytest.mark.parametrize("rule", [v.strict_topk, v.relaxed_topk])
def test_list_rules_never_wait_for_the_device(rule):
    tokens = torch.zeros(2, 3, dtype=torch.long, device="meta")
    scores, k = torch.zeros(2, 9, device="meta"), torch.ones(2, dtype=torch.long, device="meta")
    found = rule(tokens, scores, scores, k=k, most=2)
    assert found.chosen.shape == (2, 2) and found.accepted.device.type == "meta"


def test_list_rules_state_their_guarantees():
    assert (v.strict_topk.guarantee, v.relaxed_topk.guarantee) == ("exact", "heuristic")
    assert v.strict_topk.paper == v.relaxed_topk.paper == "2410.05165"


TOKENS, SCORES = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 5)
WRONG: dict[str, tuple[object, dict, type[PolyspecError], str]] = {
    "tokens that are no ids": ((TOKENS.float(), SCORES, SCORES), {"k": 1}, InputError, "torch.long"),
    "one score a row": ((TOKENS, SCORES, SCORES[0]), {"k": 1}, InputError, "2 dimensions"),
    "another batch": ((TOKENS, SCORES, SCORES[:1]), {"k": 1}, InputError, "2 rows"),
    "k = 0": ((TOKENS, SCORES, SCORES), {"k": 0}, ConfigError, "k must be"),
    "a k of 0": ((TOKENS, SCORES, SCORES), {"k": torch.tensor([1, 0])}, ConfigError, "k must be"),
    "k for another batch": ((TOKENS, SCORES, SCORES), {"k": torch.tensor([1])}, InputError, "k must be"),
}


@pytest.mark.parametrize("rule", [v.strict_topk, v.relaxed_topk])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_of_list_rules_are_one_clear_error(rule, case):
    arguments, knobs, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        rule(*arguments, **knobs)


def test_the_relaxed_rule_asks_for_what_drafts_were_drawn_from():
    with pytest.raises(InputError, match="draft_probs"):
        v.relaxed_topk(TOKENS, None, SCORES, k=1)
    with pytest.raises(InputError, match="like target_scores"):
        v.relaxed_topk(TOKENS, SCORES[:, :3], SCORES, k=1)
