"""The speech recipes end to end: exact where a knob makes them so, different where it does not, groups exact for `pcg`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gtest import g_test
from recipe_needs import overrides
from statistical.test_enumeration import BATCH, FEWER, LENGTH, NOISE, PROMPTS, THRESHOLD, VOCAB, made, model, p_value
from torch import Tensor

import polyspec
from polyspec import recipe as recipes
from polyspec import verification as v
from polyspec.api import decode, make_draws
from polyspec.decoding.chain import Chain
from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Processing
from polyspec.drafting.dflash import DFlashModel
from polyspec.modalities.speech.target import SpeechTarget
from polyspec.verification import TokenGroups, Verdict

EXACT_KNOBS = {"vadusa": {"tolerance": 1}, "speech_mtp": {"threshold": None}, "ssd": {"beta": 0.0}}
RELAXED = {"vadusa": {"tolerance": 4}, "speech_mtp": {"threshold": 0.1}, "ssd": {"beta": 0.4}}


@pytest.mark.parametrize("name", EXACT_KNOBS)
def test_without_its_tolerance_a_recipe_is_exact(name: str) -> None:
    assert p_value(made(name, **EXACT_KNOBS[name]), "sampled", FEWER // 2) > THRESHOLD


def test_a_tolerant_tree_of_a_block_drafter_is_exact_without_its_tolerance() -> None:
    heads = DFlashModel.for_target(model())
    fast = polyspec.custom_generate("vadusa", heads=heads, tolerance=1, nodes=6, length=3)
    assert p_value(fast, "sampled", FEWER // 2) > THRESHOLD


@pytest.mark.parametrize("name", RELAXED)
def test_with_its_tolerance_it_is_not_and_the_test_sees_it(name: str) -> None:
    assert p_value(made(name, **RELAXED[name]), "sampled", FEWER // 4) < THRESHOLD


# -- groups ------------------------------------------------------------------------------------------------------------

PARTITION = TokenGroups.from_labels(torch.tensor([0, 1, 1, 0, 2]))


class Grouped(SpeechTarget):
    groups = PARTITION

    def token_groups(self, mean_size: float) -> TokenGroups:
        return self.groups


def sequences(rule=None, samples: int = FEWER // 2) -> Tensor:
    """`[samples, LENGTH]` drawn by `pcg`, with another rule in its place if given."""
    recipe = recipes.find_recipe("pcg")
    method = recipes.build(recipe, {**overrides(recipe, model(), NOISE), "length": 3})
    if rule is not None:
        method = recipes.Method(method.recipe, Chain(rule), method.drafter, method.length, method.draws)
    drawn = []
    for number in range(samples // BATCH):
        rows = Sequences(torch.tensor(PROMPTS[:1]).expand(BATCH, -1), LENGTH)
        draws = make_draws(method, True, 10**6 * number, BATCH, torch.device("cpu"))
        stats = decode(method, Grouped(model()), rows, Processing([]), draws, {})
        assert 0.02 < stats.acceptance_rate < 0.98
        drawn.append(rows.result()[:, -LENGTH:])
    return torch.cat(drawn)


def group_fit(drawn: Tensor, groups: Tensor) -> float:
    """The least p-value, over all prefixes, of the groups of what follows; groups `[V]`. What stands before is taken as it
    was drawn: the guarantee is about the next group."""
    rows = torch.cat([torch.tensor(PROMPTS[0]).expand(len(drawn), -1), drawn], dim=1)
    found = []
    for step in range(LENGTH):
        index = (drawn[:, :step] * VOCAB ** torch.arange(step)).sum(1)
        for number in range(VOCAB**step):
            chosen = index == number
            if chosen.sum() < 200:
                continue
            with torch.no_grad():
                p = model()(rows[chosen][:1, : len(PROMPTS[0]) + step]).logits[0, -1].double().softmax(-1)
            expected = torch.zeros(int(groups.max()) + 1, dtype=p.dtype).index_add_(0, groups, p)
            counts = groups[drawn[chosen, step]].bincount(minlength=len(expected))
            found.append(g_test(counts, expected))
    assert len(found) > 10
    return min(found)


LABELS = torch.tensor([0, 1, 1, 0, 2])


def test_groups_of_a_partition_have_the_targets_distribution_end_to_end() -> None:
    assert group_fit(sequences(), LABELS) > THRESHOLD


def test_tokens_need_not_have_it() -> None:
    assert group_fit(sequences(), torch.arange(VOCAB)) < THRESHOLD


def accepted_by_group_redrawn_by_token(x: Tensor, q: Tensor, p: Tensor, *, generator=None) -> Verdict:
    verdict = v.coarse_grained(x, q, p, groups=PARTITION, generator=generator)
    other = v.speculative_sampling(x, q, p, generator=generator)
    return Verdict(verdict.accepted, torch.where(verdict.accepted < x.shape[1], other.next_token, verdict.next_token))


def redrawn_from_p(x: Tensor, q: Tensor, p: Tensor, *, generator=None) -> Verdict:
    verdict = v.coarse_grained(x, q, p, groups=PARTITION, generator=generator)
    return Verdict(verdict.accepted, v.sample(p[torch.arange(len(x)), verdict.accepted], generator))


def with_tolerance(x: Tensor, q: Tensor, p: Tensor, *, generator=None) -> Verdict:
    return v.additive_tolerance(x, q, p, beta=0.4, generator=generator)


@pytest.mark.parametrize("rule", [accepted_by_group_redrawn_by_token, redrawn_from_p, with_tolerance])
def test_wrong_rules_do_not_have_it(rule) -> None:
    assert group_fit(sequences(rule), LABELS) < THRESHOLD


def test_singletons_alone_make_it_exact() -> None:
    def single(x: Tensor, q: Tensor, p: Tensor, *, generator=None) -> Verdict:
        return v.coarse_grained(x, q, p, groups=TokenGroups.from_labels(torch.arange(VOCAB)), generator=generator)

    assert group_fit(sequences(single), torch.arange(VOCAB)) > THRESHOLD


# -- groups of a wanted size --------------------------------------------------------------------------------------------


def test_groups_have_the_mean_size_asked_for_and_special_tokens_are_alone() -> None:
    table = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    alone = [0, 7, 199]
    for size in (1.0, 3.0, 12.0):
        groups = TokenGroups.of_mean_size(table, size, alone)
        sizes = (groups.members < 200).sum(1)
        others = np.setdiff1d(np.arange(200), alone)
        assert abs(float(sizes[others].float().mean()) - size) < 0.05
        assert sizes[alone].tolist() == [1, 1, 1]
        near = {(t, m) for t, row in enumerate(groups.members.tolist()) for m in row if m < 200}
        assert near == {(m, t) for t, m in near}, "membership is mutual"


def test_the_targets_groups_hold_codes_only() -> None:
    target = SpeechTarget(model())
    target.codes = 3
    groups = target.token_groups(2.0)
    assert (groups.members < VOCAB).sum(1)[3:].tolist() == [1, 1]
    assert target.token_groups(2.0) is groups
