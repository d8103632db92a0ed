"""Recipes whose noise is fixed by the seed give the plain loop's tokens, whatever is drafted; every recipe repeats
itself under the same seed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from recipe_needs import by_name, overrides, text_recipes
from tiny_models import VOCAB, build, noisy_copy, target
from torch import Tensor
from transformers import PreTrainedModel

import polyspec
from polyspec.drafting.dflash import DFlashModel
from polyspec.drafting.eagle import EagleModel
from polyspec.recipe import Recipe

COUPLED = [r for r in text_recipes() if r.config.get("draws") == "coupled" and r.name != "autoregressive"]
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k, top-p and min-p": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "guidance": {"temperature": 0.9, "top_k": 10, "guidance_scale": 1.6},
    "history": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 10},
}


@cache
def prompts() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :7] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def row(index: int) -> dict[str, Tensor]:
    """Row `index` of the batch alone, its padding taken off."""
    real = prompts()["attention_mask"][index].bool()
    return {"input_ids": prompts()["input_ids"][index, real][None]}


@cache
def model() -> PreTrainedModel:
    return build("llama", scale=3.0)


def sampled(name: str, given: dict[str, Tensor], seed: Any, options: dict[str, Any], **knobs: Any) -> Tensor:
    fast = polyspec.custom_generate(name, seed=seed, **knobs)
    return model().generate(**given, do_sample=True, max_new_tokens=32, **{"top_k": 0, **options}, custom_generate=fast)


def new_tokens(output: Tensor, row: int, prompt_length: int) -> list[int]:
    """A row's tokens up to and including its end."""
    tokens = output[row, prompt_length:].tolist()
    return tokens[: tokens.index(1) + 1] if 1 in tokens else tokens


@pytest.mark.parametrize("sampling", SAMPLING)
@by_name(COUPLED)
def test_tokens_are_those_of_the_plain_loop_with_the_same_seed(recipe: Recipe, sampling: str) -> None:
    options = SAMPLING[sampling]
    knobs = overrides(recipe, model(), noise=0.2)
    for given, seed in ((prompts(), 5), (prompts(), [9, 9, 2, 10**12]), (row(0), 5)):
        expected = sampled("autoregressive", given, seed, options)
        assert torch.equal(sampled(recipe.name, given, seed, options, **knobs), expected)


@by_name([r for r in COUPLED if "draft_model" in r.needs])
def test_any_drafter_gives_the_same_tokens(recipe: Recipe) -> None:
    options = SAMPLING["temperature"]
    expected = sampled("autoregressive", prompts(), 3, options)
    padded = noisy_copy(model(), 0.1)
    padded.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
    shorter = noisy_copy(model(), 0.1)
    shorter.resize_token_embeddings(VOCAB - 9, mean_resizing=False)
    heads = [DFlashModel.for_target(model()), DFlashModel.for_target(model(), recurrent=8), EagleModel.for_target(model())]
    for drafter in (model(), noisy_copy(model(), 0.3), build("gpt2", seed=4), padded, shorter, *heads):
        assert torch.equal(sampled(recipe.name, prompts(), 3, options, draft_model=drafter, length=5), expected)


@by_name([r for r in COUPLED if "window" in r.knobs])
def test_any_window_and_initialisation_give_the_same_tokens(recipe: Recipe) -> None:
    options = SAMPLING["top-k, top-p and min-p"]
    expected = sampled("autoregressive", prompts(), 3, options)
    for knobs in ({"window": 1}, {"window": 50}, {"window": 8, "init": "random"}):
        assert torch.equal(sampled(recipe.name, prompts(), 3, options, **knobs), expected)


@by_name([*COUPLED, *(r for r in text_recipes() if r.name == "autoregressive")])
def test_a_row_of_a_batch_equals_the_single_run_with_its_own_seed(recipe: Recipe) -> None:
    options = SAMPLING["temperature"]
    knobs = overrides(recipe, model())
    together = sampled(recipe.name, prompts(), 40, options, **knobs)
    for index in range(4):
        given = row(index)
        alone = sampled(recipe.name, given, 40 + index, options, **knobs)
        assert new_tokens(alone, 0, given["input_ids"].shape[1]) == new_tokens(together, index, 9)


@by_name(COUPLED)
def test_the_first_of_several_models_layouts_does_not_matter(recipe: Recipe) -> None:
    """Sliding windows and absolute positions too."""
    for family in ("gemma3", "gpt2"):
        knobs = overrides(recipe, target(family))
        outputs = [
            target(family).generate(
                **prompts(),
                do_sample=True,
                top_k=0,
                max_new_tokens=24,
                custom_generate=polyspec.custom_generate(n, seed=1, **k),
            )
            for n, k in (("autoregressive", {}), (recipe.name, knobs))
        ]
        assert torch.equal(*outputs)


@by_name(polyspec.recipes("text"))
def test_the_same_seed_gives_the_same_output_and_another_seed_another(recipe: Recipe) -> None:
    options = {"temperature": 1.0, "top_k": 12, "eos_token_id": None, "pad_token_id": 0}
    knobs = overrides(recipe, model(), noise=0.2)
    first = sampled(recipe.name, prompts(), 7, options, **knobs)
    torch.manual_seed(123)  # the seed decides, not torch's global state
    assert torch.equal(sampled(recipe.name, prompts(), 7, options, **knobs), first)
    assert not torch.equal(sampled(recipe.name, prompts(), 8, options, **knobs), first)
    assert not torch.equal(sampled(recipe.name, prompts(), [8, 7, 9, 10], options, **knobs), first)


@by_name(polyspec.recipes("text"))
def test_without_a_seed_torchs_global_generator_decides(recipe: Recipe) -> None:
    options = {"temperature": 1.0, "eos_token_id": None, "pad_token_id": 0}
    knobs = overrides(recipe, model(), noise=0.2)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(sampled(recipe.name, prompts(), None, options, **knobs))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@by_name(polyspec.recipes("text"))
def test_rows_with_one_prompt_are_sampled_independently(recipe: Recipe) -> None:
    knobs = overrides(recipe, model(), noise=0.2)
    same = {k: v.expand(6, -1) for k, v in row(0).items()}
    output = sampled(recipe.name, same, 0, {"temperature": 1.0}, **knobs)
    assert len({tuple(r) for r in output.tolist()}) == 6
