"""The image pipeline against the model's own generate, on a small random Janus in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from recipe_needs import discrete_recipes, head_class_of

import polyspec
from polyspec.drafting.dflash import DFlashModel
from polyspec.modalities.image.target import make_image_target, to_images

_spec = importlib.util.spec_from_file_location("tiny_janus", Path(__file__).with_name("tiny_janus.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
tiny_janus = _module.tiny_janus

PROMPTS = ["red heart", "star", "blue blue car"]
EXACT = [r.name for r in discrete_recipes("image") if r.guarantee == "exact" and not r.needs]


def own_pictures(prompts: list[str], guidance_scale: float) -> list[Image.Image]:
    """What the model's own loop draws greedily."""
    model, processor = tiny_janus()
    inputs = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=guidance_scale)
    return to_images(model.decode_image_tokens(tokens).float())


def same(a: list[Image.Image], b: list[Image.Image]) -> bool:
    return len(a) == len(b) and all(ImageChops.difference(x, y).getbbox() is None for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("guidance_scale", [1.000001, 3.0])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "ragged"])
def test_greedy_pictures_are_the_models_own(recipe: str, guidance_scale: float, prompts: list[str]) -> None:
    pipe = polyspec.pipeline("image", target=tiny_janus(), recipe=recipe)
    # the model's own loop pads the shorter prompts' unconditional rows alike, so a batch is compared with a batch
    result = pipe(prompts, do_sample=False, guidance_scale=guidance_scale)
    assert same(result.outputs, own_pictures(prompts, guidance_scale))
    assert result.stats.new_tokens == 16 * len(prompts)


@pytest.mark.parametrize("recipe", ["dflash", "eagle", "eagle2", "medusa", "scd_gs"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "ragged"])
def test_greedy_pictures_are_the_models_own_whatever_heads_draft(recipe: str, prompts: list[str]) -> None:
    found = next(r for r in polyspec.recipes("image") if r.name == recipe)
    overrides = {"heads": head_class_of(found).for_target(make_image_target(tiny_janus()[0], 1.0))}
    if "init" in found.config:
        overrides["init"] = "drafter"
    pipe = polyspec.pipeline("image", target=tiny_janus(), recipe=recipe, overrides=overrides)
    assert same(pipe(prompts, do_sample=False, guidance_scale=3.0).outputs, own_pictures(prompts, 3.0))


@pytest.mark.parametrize("recipe", ["sjd", "scd_mc", "scd_gs", "gumbel_jacobi", "jacobi"])
@pytest.mark.parametrize("init", ["left", "above", "random"])
def test_a_window_takes_fewer_calls_whatever_it_starts_from(recipe: str, init: str) -> None:
    pipe = polyspec.pipeline("image", target=tiny_janus(), recipe=recipe, overrides={"init": init, "window": 8})
    result = pipe("red heart", do_sample=False)
    assert result.stats.target_calls <= 16
    assert same(result.outputs, own_pictures(["red heart"], 3.0))


@pytest.mark.parametrize("recipe", ["gumbel_jacobi", "jacobi"])
def test_shared_noise_draws_the_plain_loops_picture(recipe: str) -> None:
    knobs = {"do_sample": True, "temperature": 1.3, "top_k": 9, "guidance_scale": 2.0, "images_per_prompt": 2}
    plain = polyspec.pipeline("image", target=tiny_janus(), recipe="autoregressive")(PROMPTS, seed=5, **knobs)
    fast = polyspec.pipeline("image", target=tiny_janus(), recipe=recipe)(PROMPTS, seed=5, **knobs)
    assert same(plain.outputs, fast.outputs)


def test_the_default_draws_the_plain_loops_picture_with_a_drafter_and_without() -> None:
    heads = DFlashModel.for_target(make_image_target(tiny_janus()[0], 1.0))
    knobs = {"do_sample": True, "temperature": 1.3, "guidance_scale": 2.0}
    plain = polyspec.pipeline("image", target=tiny_janus(), recipe="autoregressive")(PROMPTS, seed=5, **knobs)
    for overrides, name in (({}, "gumbel_jacobi"), ({"draft_model": heads}, "gumbel_coupled")):
        pipe = polyspec.pipeline("image", target=tiny_janus(), overrides=overrides)
        assert pipe.method.recipe.name == name
        assert same(plain.outputs, pipe(PROMPTS, seed=5, **knobs).outputs)
    sample = polyspec.pipeline("image")  # whose drafter is shipped
    assert sample("red heart", seed=0).stats.recipe == "gumbel_coupled"
    assert sample("red heart", seed=0, guidance_scale=2.0).stats.recipe == "gumbel_jacobi"


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_baseline_of_benchmarks_is_the_models_own_generate(guidance_scale: float) -> None:
    model, processor = tiny_janus()
    target = make_image_target(model, guidance_scale)
    pictures = target.pictures(processor, target.generate(processor, PROMPTS, do_sample=False))
    assert same(pictures, own_pictures(PROMPTS, max(guidance_scale, 1.000001)))


def test_a_row_of_a_batch_is_the_picture_drawn_alone_with_its_seed() -> None:
    pipe = polyspec.pipeline("image", target=tiny_janus(), recipe="autoregressive")
    knobs = {"do_sample": True, "temperature": 1.3}
    together = pipe(["red heart", "blue heart"], seed=7, **knobs).outputs
    alone = [pipe(p, seed=7 + i, **knobs).outputs[0] for i, p in enumerate(["red heart", "blue heart"])]
    assert same(together, alone)


def test_one_prompt_many_pictures_are_told_apart_by_their_seeds() -> None:
    pipe = polyspec.pipeline("image", target=tiny_janus())
    pictures = pipe("red heart", images_per_prompt=3, seed=0, do_sample=True, temperature=1.5).outputs
    assert len(pictures) == 3 and not same(pictures[:1], pictures[1:2])
    assert all(p.size == (8, 8) for p in pictures)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "red", "images_per_prompt": 0}, "images_per_prompt"),
        ({"prompt": "red", "guidance_scale": 0.5}, "guidance_scale"),
        ({"prompt": "red", "do_sample": True, "temperature": 0.0}, "temperature"),
        ({"prompt": " ".join(["red"] * 60)}, "shorten the prompt"),
        ({"prompt": "red", "size": (32, 32)}, "this model draws 8×8 pixels"),
        ({"prompt": "red", "size": [8]}, "size must be height and width"),
    ],
)
def test_bad_requests_are_refused_before_the_model_runs(arguments: dict, fragment: str) -> None:
    model, processor = tiny_janus()
    pipe = polyspec.pipeline("image", target=(model, processor))
    calls = []
    handle = model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(polyspec.PolyspecError, match=fragment):
            pipe(**arguments)
    finally:
        handle.remove()
    assert not calls


def test_a_model_that_cannot_draw_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(polyspec.CheckpointError, match="no head for image tokens"):
        polyspec.pipeline("image", target=str(tmp_path))


@pytest.mark.parametrize(("kind", "fragment"), [("glm_image", "GlmImagePipeline"), ("chameleon", "cannot draw")])
def test_a_model_that_draws_elsewhere_or_nowhere_says_so(kind: str, fragment: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(polyspec.CheckpointError, match=fragment) as raised:
        polyspec.pipeline("image", target=str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_a_recipe_for_other_modalities_is_refused() -> None:
    with pytest.raises(polyspec.ConfigError, match="not for modality"):
        polyspec.pipeline("image", target=tiny_janus(), recipe="prompt_lookup")


def test_pictures_cover_the_pixel_range() -> None:
    (picture,) = to_images(torch.tensor([[[[-1.0, 0.0, 1.0], [-2.0, 2.0, 0.5]]]]))
    assert picture.getpixel((0, 0)) == (0, 128, 255) and picture.getpixel((1, 0)) == (0, 255, 191)
