"""The shipped vision tower on SmolLM2: it names what it is shown, and every exact recipe answers as `generate` does.

The pictures are drawn by the image sample, so that nothing has to be fetched but the language model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image

import polyspec
from polyspec.modalities.vision_language.evaluate import Example, matches
from polyspec.prompts import load_prompts
from polyspec.recipe import Recipe

PAIRS, NEW_TOKENS = 32, 64
NEAR_TIE = 1e-4  # logits closer than this are decided by rounding

pytestmark = pytest.mark.slow


@cache
def pictures() -> tuple[list[str], list[Image.Image]]:
    names = load_prompts("emoji")[:PAIRS]
    return names, polyspec.pipeline("image", device="cpu")(names, seed=0).outputs


@cache
def pipe(recipe: str) -> Any:
    loaded = None if recipe == "autoregressive" else pipe("autoregressive").loaded
    return polyspec.pipeline("vision_language", target=loaded, recipe=recipe, dtype="float32", device="cpu",
                             overrides=given(recipe) if loaded else None)  # fmt: skip


def given(recipe: str) -> dict[str, Any]:
    """What a recipe needs, from what comes with the language model."""
    from polyspec.pipelines import shipped_drafter
    from polyspec.recipe import find_recipe

    found = find_recipe(recipe)
    needs = {need: shipped_drafter("smollm2-135m-instruct", found, need) for need in found.needs}
    if missing := [need for need, folder in needs.items() if folder is None]:
        pytest.skip(f"{missing[0]} of {recipe} is not shipped")
    return {need: str(folder) for need, folder in needs.items()}


@cache
def encoded(size: int) -> list[dict[str, torch.Tensor]]:
    questions = load_prompts("picture_questions")
    asked = [questions[k % len(questions)] for k in range(PAIRS)]
    _, seen = pictures()
    parts = range(0, PAIRS, size)
    return [pipe("autoregressive").encode(asked[i : i + size], [[p] for p in seen[i : i + size]]) for i in parts]


def generate(inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return pipe("autoregressive").model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, **options)


@cache
def expected(size: int) -> list[torch.Tensor]:
    return [generate(inputs) for inputs in encoded(size)]


def exact(modality: str) -> list[Recipe]:
    return [r for r in polyspec.recipes(modality) if r.guarantee == "exact" and r.name != "autoregressive"]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("recipe", exact("vision_language"), ids=lambda r: r.name)
def test_answers_about_pictures_are_those_of_generate(recipe: Recipe, size: int) -> None:
    fast = polyspec.custom_generate(recipe.name, seed=0, **given(recipe.name))
    for inputs, reference in zip(encoded(size), expected(size), strict=True):
        assert_same(inputs, generate(inputs, custom_generate=fast), reference)


def assert_same(inputs: dict[str, torch.Tensor], ids: torch.Tensor, reference: torch.Tensor) -> None:
    """Equal, or parted where the model's own two best logits are as good as equal."""
    width = inputs["input_ids"].shape[1]
    for row in range(len(ids)):
        ours, theirs = ids[row, width:], reference[row, width:]
        length = min(len(ours), len(theirs))
        differ = (ours[:length] != theirs[:length]).nonzero()
        if not len(differ):
            continue
        at = int(differ[0])
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        grown = torch.cat([one["input_ids"], theirs[None, :at]], 1)
        mask = torch.cat([one["attention_mask"], torch.ones(1, at, dtype=torch.long)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = (
                pipe("autoregressive")
                .model(**{**one, "input_ids": grown, "attention_mask": mask}, position_ids=positions)
                .logits[0, -1]
            )
        gap = abs(float(logits[ours[at]] - logits[theirs[at]]))
        assert gap < NEAR_TIE, f"row {row}: token {at} is {int(ours[at])}, not {int(theirs[at])}; logits {gap} apart"


def test_it_names_pictures_it_knows_and_needs_to_see_them() -> None:
    names, seen = pictures()
    examples = [Example(picture, name, ()) for name, picture in zip(names, seen, strict=True)]
    found = matches(pipe("autoregressive"), examples, "What is in the picture?")
    blind = matches(pipe("autoregressive"), examples, "What is in the picture?", seen=False)
    assert found["partial"] > blind["partial"] + 0.2
