"""Acceptance counted beside 1 − TV: what a lossless rule keeps of drafts drawn from q is their overlap with p."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from recipe_needs import overrides
from tiny_models import target

import polyspec
from polyspec.bench.overlap import Overlap, watched
from polyspec.decoding.tree import TreeLoop
from polyspec.recipe import find_recipe
from polyspec.verification import lantern, speculative_sampling
from polyspec.verification.rule import for_target


@pytest.mark.parametrize("rule", [speculative_sampling, partial(lantern, delta=0.1)])
def test_a_watched_rule_answers_as_before_and_is_asked_for_the_same(rule: object) -> None:
    loop = SimpleNamespace(verifier=rule)
    with watched(loop):
        assert loop.verifier is not rule
        labelled = getattr(loop.verifier, "func", loop.verifier)
        assert labelled.guarantee == getattr(rule, "func", rule).guarantee  # type: ignore[attr-defined]
        if rule is speculative_sampling:
            assert for_target(loop.verifier, object()) is loop.verifier
    assert loop.verifier is rule


def test_acceptance_of_speculative_sampling_is_one_minus_total_variation() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(1, 4, 6, generator=g).softmax(-1).expand(40_000, -1, -1) for _ in range(2))
    q = (4 * q).softmax(-1)[:, :3]
    x = torch.multinomial(q.reshape(-1, 6), 1, generator=g).view(-1, 3)

    loop = SimpleNamespace(verifier=speculative_sampling)
    with watched(loop) as seen:
        loop.verifier(x, q, p, generator=g)
    assert seen.figures is not None
    accepted, overlap = seen.figures
    assert accepted == pytest.approx(overlap, abs=0.01)


def test_only_tokens_that_were_tried_are_counted() -> None:
    seen = Overlap()
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]])
    seen.count(torch.tensor([0]), torch.tensor([[1, 0]]), torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]), p)
    assert seen.figures == (0.0, 0.25)
    seen.count(torch.tensor([2]), torch.tensor([[0, 1]]), None, p)
    assert seen.figures == (pytest.approx(2 / 3), pytest.approx((0.25 + 1.0 + 0.5) / 3))


@pytest.mark.parametrize("name", ["block_verification", "scd_mc"])
def test_whole_runs_are_watched(name: str) -> None:
    model = target("llama")
    recipe = find_recipe(name)
    run = polyspec.custom_generate(name, seed=0, **overrides(recipe, model))
    prompt = torch.tensor([[5, 9, 3]])
    options = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(prompt, custom_generate=run, **options)
    with watched(run.method.loop) as seen:
        assert torch.equal(model.generate(prompt, custom_generate=run, **options), plain)
    assert seen.figures is not None and 0 < seen.figures[1] < 1


def test_trees_count_nothing() -> None:
    with watched(TreeLoop(lambda: None)) as seen:  # type: ignore[arg-type]
        pass
    assert seen.figures is None
