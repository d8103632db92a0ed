"""GLM-Image's autoregressive stage: inside its own generate, and inside diffusers' pipeline, on a small random model."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from recipe_needs import discrete_recipes, head_class_of
from tiny_glm_image import CODES, DRAWABLE, SIDE, request, tiny_glm_image, tiny_pipeline
from torch import Tensor

import polyspec
from polyspec.modalities.image import accelerate
from polyspec.target import Target, make_target

DRAW, EDIT = [[1, 3, 4], [1, 2, 3]], [[1, 2, 2], [1, 3, 4]]  # (1, rows, columns): the large picture and the small one
PROMPTS = ["red heart blue", "star"]
EXACT = [r.name for r in discrete_recipes("image") if r.guarantee == "exact" and not r.needs]
HEADS = ["dflash", "eagle", "eagle2", "medusa"]


def method(recipe: str, **knobs: Any) -> Any:
    if recipe in (*HEADS, "lantern_pp"):
        kind = head_class_of(next(r for r in polyspec.recipes("image") if r.name == recipe))
        knobs["heads"] = kind.for_target(make_target(tiny_glm_image()))
    return polyspec.custom_generate(recipe, **knobs)


def generate(prompts: list[str], grids: list[list[int]], pictures: int = 0, **options: Any) -> Tensor:
    count = sum(height * width for _, height, width in grids[pictures:]) + 1
    inputs = request(prompts, grids, pictures)
    return tiny_glm_image().generate(**inputs, **{"max_new_tokens": count, "do_sample": False, **options})


@pytest.mark.parametrize("recipe", [*EXACT, *HEADS])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "ragged"])
@pytest.mark.parametrize(("grids", "pictures"), [(DRAW, 0), (EDIT, 1)], ids=["draw", "edit"])
def test_greedy_tokens_are_the_models_own(
    recipe: str, prompts: list[str], grids: list[list[int]], pictures: int
) -> None:
    fast = method(recipe)
    drawn = generate(prompts, grids, pictures, custom_generate=fast)
    assert torch.equal(drawn, generate(prompts, grids, pictures))
    assert fast.stats.new_tokens == len(prompts) * (19 if grids is DRAW else 13)


def test_the_general_target_would_draw_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests here do depend on where in a picture a token stands."""
    monkeypatch.setattr("polyspec.api.make_target", lambda model, guidance: Target(model, guidance))
    drawn = generate(PROMPTS, DRAW, custom_generate=method("autoregressive"))
    assert not torch.equal(drawn, generate(PROMPTS, DRAW))


def test_rows_that_end_early_are_padded_as_by_generate() -> None:
    options = {"eos_token_id": int(generate(PROMPTS, DRAW)[0, -5])}
    own = generate(PROMPTS, DRAW, **options)
    assert torch.equal(generate(PROMPTS, DRAW, custom_generate=method("scd_gs"), **options), own)


@pytest.mark.parametrize("recipe", ["gumbel_jacobi", "jacobi"])
@pytest.mark.parametrize("init", ["left", "above", "random"])
def test_shared_noise_draws_the_plain_loops_tokens(recipe: str, init: str) -> None:
    options = {"do_sample": True, "temperature": 2.0, "top_k": 5}
    plain = generate(PROMPTS, DRAW, custom_generate=method("autoregressive", seed=3), **options)
    fast = method(recipe, seed=3, init=init)
    assert torch.equal(generate(PROMPTS, DRAW, custom_generate=fast, **options), plain)


@pytest.mark.parametrize("recipe", ["sjd", "scd_gs", "sjd_pac", "gsd", "eagle", "lantern_pp"])
def test_samples_are_drawable_tokens(recipe: str) -> None:
    drawn = generate(
        PROMPTS, DRAW, custom_generate=method(recipe, seed=0), do_sample=True, temperature=9.0, eos_token_id=-1
    )
    assert drawn.shape[1] == generate(PROMPTS, DRAW).shape[1]
    assert bool((drawn[:, -19:] < DRAWABLE).all()) and len(drawn[:, -19:].unique()) > 8


def test_neighbours_span_what_can_be_drawn() -> None:
    target: Any = make_target(tiny_glm_image())
    assert target.vocab_size == DRAWABLE and target.codebook.shape[0] == DRAWABLE
    norms = target.codebook[:CODES].norm(dim=1)
    assert torch.allclose(norms, torch.ones(CODES)) and bool(target.codebook[CODES:].isinf().all())
    assert bool((target.neighbours[:CODES] < CODES).all())
    assert bool((target.neighbours[CODES:] == torch.arange(CODES, DRAWABLE)[:, None]).all())


def test_guidance_is_refused() -> None:
    with pytest.raises(polyspec.ConfigError, match="leave guidance_scale out"):
        generate(PROMPTS, DRAW, custom_generate=method("sjd"), guidance_scale=2.0)


def prior(seed: int = 4) -> Tensor:
    """The large picture's tokens for two prompts, as the diffusers pipeline draws them."""
    generator = torch.Generator().manual_seed(seed)
    with mock.patch.multiple(tiny_glm_image().generation_config, temperature=8.0, eos_token_id=None):
        return tiny_pipeline().generate_prior_tokens(PROMPTS, 2 * SIDE, 2 * SIDE, generator=generator)[0]


def test_a_diffusers_pipeline_draws_its_tokens_with_the_recipe_and_its_own_generator() -> None:
    model = tiny_glm_image()
    own = prior()
    with accelerate(tiny_pipeline(), "autoregressive") as plain:
        expected = prior()
        assert plain.stats.new_tokens == 2 * (16 * 16 + 4 + 1)
    with accelerate(tiny_pipeline(), "gumbel_jacobi", window=16) as fast:
        assert torch.equal(prior(), expected) and torch.equal(prior(), expected)
        assert not torch.equal(prior(seed=5), expected)
        assert fast.stats.recipe == "gumbel_jacobi" and fast.stats.target_calls < plain.stats.target_calls
    assert "generate" not in model.__dict__
    assert torch.equal(prior(), own)


def test_a_whole_picture() -> None:
    with accelerate(tiny_pipeline()) as fast:
        (picture,) = tiny_pipeline()("red heart", height=SIDE, width=SIDE, num_inference_steps=1).images
    assert picture.size == (SIDE, SIDE) and fast.stats.recipe == "scd_gs"


def test_the_last_recipe_put_in_is_the_one_in_use() -> None:
    model = tiny_glm_image()
    first = accelerate(tiny_pipeline(), "sjd")
    second = accelerate(tiny_pipeline(), "autoregressive")
    first.restore()
    prior()
    assert second.stats.target_calls and not first.stats.target_calls
    second.restore()
    assert "generate" not in model.__dict__


def test_what_cannot_be_accelerated_is_refused() -> None:
    with pytest.raises(polyspec.UnsupportedModelError, match="no model that draws tokens"):
        accelerate(object())
    with pytest.raises(polyspec.ConfigError, match="not for modality 'image'"):
        accelerate(tiny_pipeline(), "lookahead")
    with pytest.raises(polyspec.ConfigError, match="'window'"):
        accelerate(tiny_pipeline(), "sjd", windw=3)
    assert "generate" not in tiny_glm_image().__dict__
