"""What every recipe is tested with: its needs, and knobs that do not depend on the clock.

A recipe that declares a need which is missing from `NEEDS` fails the tests that every recipe must pass, so that no
recipe goes unproved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hydra.utils import get_object
from tiny_models import noisy_copy
from transformers import PreTrainedModel

import polyspec
from polyspec.drafting.dflash import DFlashModel
from polyspec.drafting.eagle import EagleModel
from polyspec.drafting.heads import HeadModel
from polyspec.drafting.medusa import MedusaModel
from polyspec.recipe import Recipe

HEADS: dict[str, type[HeadModel]] = {"dflash": DFlashModel, "eagle": EagleModel, "medusa": MedusaModel}


@cache
def drafter_copy(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    return noisy_copy(model, noise)


@cache
def texts(model: PreTrainedModel) -> list[list[int]]:
    """What a datastore holds: for a decoder-only model its own greedy text, in part, else random tokens."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    prompts = torch.randint(2, vocab, (16, 4), generator=torch.Generator().manual_seed(7))
    if model.config.is_encoder_decoder:
        return prompts.repeat(1, 4).tolist()
    return model.generate(prompts, do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0).tolist()


@cache
def heads(drafter: str, model: PreTrainedModel) -> Any:
    """Untrained heads of a kind that the drafter takes."""
    return head_class(drafter).for_target(model)


def head_class(drafter: str) -> type[HeadModel]:
    """The class of heads that the drafter of this import path takes; of several the one a sample would take last."""
    made_by: Any = get_object(drafter)
    return HEADS[made_by.shipped[-1]] if hasattr(made_by, "shipped") else made_by.kind


def head_class_of(recipe: Recipe) -> type[HeadModel]:
    """The same, of a recipe."""
    return head_class(recipe.config.drafter.get("inner", recipe.config.drafter)._target_)


NEEDS: dict[str, Callable[[Recipe, PreTrainedModel, float], Any]] = {
    "draft_model": lambda recipe, model, noise: drafter_copy(model, noise),
    "heads": lambda recipe, model, noise: heads(recipe.config.drafter.get("inner", recipe.config.drafter)._target_, model),
    "datastore": lambda recipe, model, noise: texts(model),
    "pools": lambda recipe, model, noise: {"default": texts(model)},
}
"""How to make what a recipe needs, for a target model; noise says how far the drafter is from the target."""

CONTINUOUS = "polyspec.decoding.continuous."

KNOBS = {"length": 4, "window": 6}
"""Small and fixed, where a recipe has the knob: the default lengths are tuned to the machine while running."""


def overrides(recipe: Recipe, model: PreTrainedModel, noise: float = 0.1, **knobs: Any) -> dict[str, Any]:
    """Arguments of `custom_generate` for a run of `recipe` on `model`; fails the test if a need cannot be supplied."""
    needs = [*recipe.needs, *(recipe.takes if knobs.get("init") == "drafter" else ())]
    missing = [need for need in needs if need not in NEEDS]
    if missing:
        pytest.fail(f"recipe {recipe.name} needs {missing}: add how to make it to tests/recipe_needs.py")
    chosen = {**KNOBS, **knobs}
    return {
        **{need: NEEDS[need](recipe, model, noise) for need in needs},
        **{knob: value for knob, value in chosen.items() if knob in recipe.knobs},
    }


def text_recipes(guarantee: str = "exact") -> list[Recipe]:
    """Recipes with `guarantee` that apply to text models."""
    return [r for r in polyspec.recipes("text") if r.guarantee == guarantee]


def discrete_recipes(modality: str) -> list[Recipe]:
    """Recipes of `modality` for models of discrete tokens; those for continuous ones are proved in
    tests/statistical/test_continuous.py."""
    return [r for r in polyspec.recipes(modality) if not r.config.loop._target_.startswith(CONTINUOUS)]


def continuous_recipes() -> list[Recipe]:
    """Recipes for models whose tokens are continuous."""
    return [r for r in polyspec.recipes() if r.config.loop._target_.startswith(CONTINUOUS)]


def by_name(recipes: list[Recipe]) -> Any:
    """A pytest parametrisation over recipes, named after them."""
    return pytest.mark.parametrize("recipe", recipes, ids=lambda r: r.name)
