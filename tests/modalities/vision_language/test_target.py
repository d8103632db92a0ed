"""Vision-language models decode as their own `generate` does, whatever drafts, and look at each image once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from recipe_needs import by_name, overrides
from tiny_models import llama, sharpen
from tiny_vlms import CONFIGS, IMAGE, ROWS, VOCAB, Inputs, prompt, target, vision_tower
from torch import Tensor

import polyspec
from polyspec.drafting.image_views import ImageAdapter, ImageAdapterConfig
from polyspec.modalities.vision_language.target import PaliGemmaTarget
from polyspec.recipe import Recipe, find_recipe
from polyspec.target import Target

NEW_TOKENS = 16
RECIPES = (
    "autoregressive", "prompt_lookup", "speculative_sampling", "medusa", "eagle", "dflash", "text_only_draft", "ibed",
    "tabed",
)  # fmt: skip
EXACT = [r for r in polyspec.recipes("vision_language") if r.guarantee == "exact"]


@cache
def drafter() -> Any:
    """A text model with a padded vocabulary, narrower than the targets."""
    torch.manual_seed(3)
    return sharpen(llama(vocab=VOCAB + 3, hidden=16), 6.0).eval()


@cache
def adapter() -> ImageAdapter:
    torch.manual_seed(4)
    return ImageAdapter(ImageAdapterConfig(feature_size=32, hidden_size=24, output_size=16)).eval()


def drafting(recipe: Recipe) -> dict[str, Any]:
    """What a recipe's drafter needs here, and all that it takes."""
    made = {
        "draft_model": drafter(),
        "image_adapter": adapter(),
        "captioner": lambda row, image: [5 + row, 6 + image, 7][: 1 + image + row],
    }
    return {k: v for k, v in made.items() if k in (*recipe.needs, *recipe.takes)}


def plain(model: Any, given: Inputs, **options: Any) -> Tensor:
    return model.generate(**given, **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **options})


def run(recipe: str, model: Any, given: Inputs, **options: Any) -> Tensor:
    knobs = {**overrides(find_recipe(recipe), model), **drafting(find_recipe(recipe))}
    return plain(model, given, custom_generate=polyspec.custom_generate(recipe, seed=0, **knobs), **options)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_generate_for_one_row(family: str) -> None:
    model = target(family)
    given = prompt(family, ROWS[:1])
    expected = plain(model, given)
    blind = {**given, "pixel_values": given["pixel_values"].flip(-1)}
    assert not torch.equal(plain(model, blind), expected), "the image should matter"
    for recipe in ("autoregressive", "dflash", "ibed"):
        assert torch.equal(run(recipe, model, given), expected), recipe


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_generate_for_ragged_rows_with_one_two_and_no_images(family: str) -> None:
    model = target(family)
    given = prompt(family, ROWS)
    free = plain(model, given, eos_token_id=None, pad_token_id=0)[:, -NEW_TOKENS:]
    ends = sorted({int(free[1, 5]), int(free[3, 11])})
    expected = plain(model, given, eos_token_id=ends, pad_token_id=0)
    for recipe in RECIPES:
        assert torch.equal(run(recipe, model, given, eos_token_id=ends, pad_token_id=0), expected), recipe


@by_name(EXACT)
def test_every_exact_recipe_gives_the_tokens_of_generate(recipe: Recipe) -> None:
    model, given = target("llava"), prompt("llava", ROWS)
    assert torch.equal(run(recipe.name, model, given), plain(model, given))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
def test_the_vision_tower_runs_once_a_request(family: str) -> None:
    model, calls = target(family), []
    hook = vision_tower(model).register_forward_hook(lambda *_: calls.append(1))
    try:
        run("ibed", model, prompt(family, ROWS[:2]))
    finally:
        hook.remove()
    assert len(calls) == 1


def differs(family: str) -> bool:
    given = prompt(family, ROWS)
    return not torch.equal(run("autoregressive", target(family), given), plain(target(family), given))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_counted_as_in_a_text_would_be_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not differs(family)
    monkeypatch.setattr(Target, "place", lambda self, slots: slots)
    assert differs(family)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_images_whose_tokens_see_only_what_precedes_them_would_be_noticed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not differs(family)
    monkeypatch.setattr("polyspec.prompt_inputs.own_mask", lambda *_: None)
    assert differs(family)


def test_a_prompt_whose_last_token_its_prefix_cannot_see_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PaliGemmaTarget, "run_prompt", lambda self, x: Target.run_prompt(self, x[:, :-1]))
    with pytest.raises((AssertionError, RuntimeError)):
        assert not differs("paligemma")


@pytest.mark.parametrize("edit", ["one placeholder too few", "no image", "an image too many"])
def test_placeholders_that_do_not_match_the_images_are_refused(edit: str) -> None:
    given = prompt("llava", ROWS[:1])
    if edit == "one placeholder too few":
        given["input_ids"] = given["input_ids"].masked_fill(torch.arange(given["input_ids"].shape[1]) == 6, 5)
    elif edit == "no image":
        del given["pixel_values"]
    else:
        given["pixel_values"] = given["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(polyspec.InputError, match="placeholders"):
        run("prompt_lookup", target("llava"), given)


def test_a_prompt_that_ends_in_an_image_is_refused() -> None:
    given = prompt("llava", ((5, 1, 0),))
    cut = {k: v[:, :-1] if k != "pixel_values" else v for k, v in given.items()}
    assert int(cut["input_ids"][0, -1]) == IMAGE
    with pytest.raises(polyspec.InputError, match="ends in an image"):
        run("prompt_lookup", target("llava"), cut)


def test_guidance_with_images_is_refused() -> None:
    with pytest.raises(polyspec.ConfigError, match="guidance_scale"):
        run("prompt_lookup", target("llava"), prompt("llava", ROWS), guidance_scale=1.5)


def test_a_drafter_of_another_tokenizer_is_refused() -> None:
    other = llama(vocab=VOCAB + 5000)
    fast = polyspec.custom_generate("speculative_sampling", draft_model=other)
    with pytest.raises(polyspec.InputError, match="tokenizer"):
        plain(target("llava"), prompt("llava", ROWS), custom_generate=fast)


def test_text_beyond_a_sliding_window_that_one_mask_cannot_show_is_refused() -> None:
    model = target("paligemma2")
    model.config.text_config.sliding_window = 20
    try:
        with pytest.raises(polyspec.UnsupportedModelError, match="sliding window of 20"):
            run("autoregressive", model, prompt("paligemma2", ROWS))
    finally:
        model.config.text_config.sliding_window = 4096
