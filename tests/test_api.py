"""The public surface, and what a run reports about itself."""

from __future__ import annotations

import json

import pytest
import torch
from recipe_needs import by_name, overrides, text_recipes
from tiny_models import VOCAB, noisy_copy, target

import polyspec
from polyspec import DecodingStats

IDS = torch.randint(2, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))


def test_the_public_names_are_these() -> None:
    assert sorted(polyspec.__all__) == [
        "Audio",
        "CheckpointError",
        "ConfigError",
        "CustomGenerate",
        "DecodingStats",
        "InputError",
        "PolyspecError",
        "Recipe",
        "Recommendation",
        "Result",
        "UnsupportedModelError",
        "custom_generate",
        "pipeline",
        "recipes",
    ]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = polyspec.nothing


@by_name(text_recipes())
def test_stats_add_up(recipe: polyspec.Recipe) -> None:
    model = target("llama")
    fast = polyspec.custom_generate(recipe.name, seed=0, **overrides(recipe, model))
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))  # last: a drafter may be the model's copy
    output = model.generate(IDS, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0, custom_generate=fast)
    handle.remove()
    stats = fast.stats
    assert output.shape == (3, 26)
    assert (stats.recipe, stats.guarantee) == (recipe.name, "exact")
    assert stats.new_tokens == 3 * 20
    # every call but the prompt's; a drafter may run the target's first layers through the model's own forward
    assert len(calls) - 1 in (stats.target_calls, stats.target_calls + stats.draft_calls)
    assert stats.new_tokens == stats.row_calls + stats.accepted_tokens
    assert stats.tokens_per_call == stats.new_tokens / stats.row_calls
    assert sum(stats.accepted_by_position) == stats.accepted_tokens <= stats.proposed_tokens <= stats.scored_tokens
    assert stats.proposed_by_position == sorted(stats.proposed_by_position, reverse=True)
    spent = stats.prefill_seconds + stats.target_seconds + stats.draft_seconds + stats.verify_seconds
    assert 0 < spent <= stats.wall_seconds
    assert json.loads(json.dumps(stats.to_dict()))["tokens_per_call"] == stats.tokens_per_call


def test_stats_without_a_run_are_zero() -> None:
    empty = DecodingStats()
    assert empty.tokens_per_call == empty.acceptance_rate == 0


def test_one_callable_serves_many_calls_and_models() -> None:
    fast = polyspec.custom_generate("prompt_lookup", length=3)
    for family in ("llama", "gpt2", "llama"):
        for rows in (3, 1):
            expected = target(family).generate(IDS[:rows], do_sample=False, max_new_tokens=12)
            got = target(family).generate(IDS[:rows], do_sample=False, max_new_tokens=12, custom_generate=fast)
            assert torch.equal(got, expected)


def test_more_is_accepted_from_a_better_drafter() -> None:
    model = target("llama")
    rates = []
    for noise in (0.0, 0.1, 1.0):
        fast = polyspec.custom_generate("speculative_sampling", seed=0, draft_model=noisy_copy(model, noise), length=4)
        model.generate(IDS, do_sample=True, max_new_tokens=40, eos_token_id=None, pad_token_id=0, custom_generate=fast)
        rates.append(fast.stats.acceptance_rate)
    assert rates[0] > 0.95 > rates[1] > rates[2]
