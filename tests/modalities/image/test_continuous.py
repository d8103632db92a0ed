"""The continuous image model: its target against its own forward pass, its pipeline, its training, bad input."""

from __future__ import annotations

import io
import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_latent
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from recipe_needs import continuous_recipes

import polyspec
import polyspec.conf
from polyspec.denoising import ContinuousTarget
from polyspec.drafting.continuous import LatentDraftModel
from polyspec.errors import CheckpointError, ConfigError, InputError, PolyspecError
from polyspec.modalities.image.continuous import LatentImageModel
from polyspec.modalities.image.continuous.model import in_raster
from polyspec.modalities.image.continuous.pipeline import ContinuousPipeline
from polyspec.modalities.image.sample import sample_path
from polyspec.recipe import build, find_recipe

PROMPTS = ["red heart", "blue star red"]
RECIPES = ["autoregressive", *(r.name for r in continuous_recipes())]


def pipe(recipe: str, overrides=None, **config):
    return polyspec.pipeline("image", target=tiny_latent.target(**config), recipe=recipe, overrides=overrides)


def test_latents_are_cut_into_tokens_and_put_together_again() -> None:
    model = tiny_latent.model(latent_mean=[0.3, 0.0, 0.0, 1.0], latent_std=[2.0, 1.0, 1.0, 0.5])
    latents = torch.randn(2, 4, 8, 8)
    tokens = model.to_tokens(latents)
    assert tokens.shape == (2, 16, 16)
    torch.testing.assert_close(model.to_latents(tokens), latents)
    first, _, _, last = tokens[0, 1].view(4, 2, 2)
    torch.testing.assert_close(first, (latents[0, 0, :2, 2:4] - 0.3) / 2)
    torch.testing.assert_close(last, (latents[0, 3, :2, 2:4] - 1) / 0.5)


def test_tokens_of_any_order_find_their_places() -> None:
    tokens = torch.randn(2, 16, 3)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    drawn = tokens.gather(1, order[..., None].expand_as(tokens))
    assert torch.equal(in_raster(drawn, order), tokens) and not torch.equal(drawn, tokens)


@pytest.mark.parametrize("kind", ["raster", "random"])
@torch.no_grad()
def test_the_target_gives_the_models_conditions_whatever_was_rolled_back(kind: str) -> None:
    model = tiny_latent.model(order=kind)
    prompts = [tiny_latent.tokenizer()(p + "<boi>").input_ids for p in PROMPTS]
    tokens = torch.randn(2, 16, 16)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    order = torch.stack([torch.randperm(16) for _ in prompts]) if kind == "random" else None
    whole = model(ids, torch.tensor([len(p) for p in prompts]), tokens, order)
    target = model.latent_target(1.5)
    assert isinstance(target, ContinuousTarget)
    target.prefill(prompts if order is None else list(zip(prompts, order, strict=True)), 16)
    kept = [0, 0]
    for width, keep in ((3, [1, 3]), (4, [2, 1]), (5, [5, 4])):
        slots = torch.tensor(kept)[:, None] + torch.arange(width)
        fed = tokens.gather(1, (slots - 1).clamp(min=0)[..., None].expand(-1, -1, 16))
        hidden = whole.gather(1, slots[..., None].expand(-1, -1, whole.shape[-1]))
        found, expected = target.forward(fed), target.conditions(hidden.unsqueeze(2))
        torch.testing.assert_close(found[:, :, :, :1], expected, atol=1e-4, rtol=1e-4)
        kept = [n + k for n, k in zip(kept, keep, strict=True)]
        target.rollback(kept)


@torch.no_grad()
def test_guidance_combines_two_streams_in_one_head_call() -> None:
    model = tiny_latent.model()
    guided, step = model.latent_target(2.0), torch.tensor([2, 4])
    condition, x = torch.randn(2, 2, 32), torch.randn(2, 16)
    with_words, without = (model.head(x, guided.sampler.timesteps[step], condition[:, g]) for g in range(2))
    expected = guided.sampler.mean(without + 2 * (with_words - without), x, step)
    prepared = guided.conditions(condition.unsqueeze(1))[:, 0]
    torch.testing.assert_close(guided.means(prepared, x, step), expected)


@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_draws_the_same_pictures_with_the_same_seed(recipe: str, order: str) -> None:
    made = pipe(recipe, {} if recipe == "autoregressive" else {"length": 2}, order=order)
    first, second, other = (made(PROMPTS, seed=s, guidance_scale=2.0) for s in (3, 3, 4))
    assert [o.size for o in first.outputs] == [(16, 16)] * 2
    pixels = [[np.asarray(o) for o in r.outputs] for r in (first, second, other)]
    assert all(np.array_equal(a, b) for a, b in zip(*pixels[:2], strict=True))
    assert not np.array_equal(pixels[0][0], pixels[2][0])
    stats = first.stats
    assert stats.new_tokens == 32 and stats.guarantee == find_recipe(recipe).guarantee
    assert stats.head_calls > 0 and (stats.draft_head_calls > 0) == (recipe != "autoregressive")
    assert "accepted_by_step" in stats.to_dict()


def test_a_row_of_a_plain_batch_is_the_single_run_with_its_seed() -> None:
    made = pipe("autoregressive")
    ids = [tiny_latent.tokenizer()(p + "<boi>").input_ids for p in PROMPTS]
    both, _ = made.draw(ids, 5, 1.0, None)
    for row in range(2):
        alone, stats = made.draw([ids[row]], 5 + row, 1.0, None)
        torch.testing.assert_close(alone[0], both[row], atol=1e-3, rtol=1e-3)
    assert stats.head_calls == 16 * tiny_latent.STEPS and stats.target_calls == 16


@pytest.mark.parametrize("order", ["raster", "random"])
def test_a_draft_that_is_the_target_is_always_kept(order: str) -> None:
    made = tiny_latent.target(order=order)
    drawn = polyspec.pipeline(
        "image", target=(*made[:3], made[0]), recipe="reflection", overrides={"length": 3, "window": 1}
    )
    stats = drawn("red heart", seed=0, guidance_scale=1.5).stats
    assert stats.acceptance_rate > 0.97 and stats.target_calls == 4


def test_a_window_of_steps_saves_head_calls() -> None:
    made = tiny_latent.target(denoising_steps=30)[:3]
    calls = [
        polyspec.pipeline("image", target=made, recipe="reflection", overrides={"window": w})(
            "red heart", seed=0
        ).stats.head_calls
        for w in (1, 6)
    ]
    assert calls[0] == 16 * 30 and calls[1] < calls[0]


def bad_sampler(**config):
    return lambda: pipe("reflection", scheduler=config)


BAD = {
    "a deterministic last step": (bad_sampler(variance_type="fixed_small"), ConfigError, "last step is deterministic"),
    "learned covariances": (bad_sampler(variance_type="learned"), PolyspecError, "one covariance"),
    "zero steps": (lambda: pipe("autoregressive", denoising_steps=0), ConfigError, "denoising steps"),
    "covariances that differ": (
        lambda: pipe("reflection", {"draft_model": tiny_latent.model(1, last_std=0.5)}),
        InputError,
        "covariances of draft and target differ",
    ),
    "latents of another size": (
        lambda: pipe("reflection", {"draft_model": tiny_latent.model(1, patch=1)}),
        InputError,
        "latents have 4 numbers, the target's 16",
    ),
    "another number of steps": (
        lambda: pipe("cspd", {"draft_model": tiny_latent.model(1, denoising_steps=3)}),
        InputError,
        "denoises in 3 steps",
    ),
    "places in another order": (
        lambda: pipe("reflection", {"draft_model": tiny_latent.model(1, order="random"), "length": 2})("red heart"),
        ConfigError,
        "draw in the same order",
    ),
    "an order that is none": (lambda: tiny_latent.model(order="spiral"), ConfigError, "order must be raster or random"),
    "a recipe for discrete tokens": (lambda: pipe("sjd"), ConfigError, "is for discrete tokens"),
    "a discrete target": (
        lambda: polyspec.pipeline("image", target=sample_path(), recipe="reflection"),
        ConfigError,
        "is for continuous tokens",
    ),
    "generate": (lambda: polyspec.custom_generate("reflection"), ConfigError, "models of continuous tokens"),
    "no draft model": (
        lambda: polyspec.pipeline("image", target=tiny_latent.target()[:3], recipe="cspd"),
        ConfigError,
        "needs draft_model",
    ),
    "something else as a draft model": (lambda: LatentDraftModel(3), ConfigError, "model of continuous tokens"),
    "a window of nothing": (lambda: pipe("reflection", {"window": 0}), ConfigError, "window must be"),
    "an empty prompt": (lambda: pipe("reflection")(" "), InputError, "prompt is empty"),
    "no folder of a draft model": (lambda: build(find_recipe("cspd"), {"draft_model": "/no"}), CheckpointError, "/no"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_to_change(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def saved(folder: Path) -> Path:
    """The tiny target as a folder."""
    model, words, vae, draft = tiny_latent.target()
    for part, place in ((model, ""), (words, ""), (vae, "vae"), (draft, "draft"), (words, "draft")):
        part.save_pretrained(folder / place)
    return folder


def bench(*changes: str) -> None:
    with initialize_config_module("polyspec.conf", version_base="1.3"):
        config = compose("config", ["task=bench", "modality=image", "bench=image_continuous", "device=cpu", *changes])
    instantiate(config.task.run)(config)


def test_the_bench_reports_speed_calls_and_acceptance_beside_its_bound(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYSPEC_CACHE", str(tmp_path))
    settings = ("bench.count=1", "bench.batches=[1,2]", "bench.repeats=1")
    recipes = "bench.recipes=[{name:reflection,overrides:{length:2}}]"
    bench(f"target={saved(tmp_path / 'model')}", recipes, *settings)
    folder = tmp_path / "bench-image-continuous"
    plain, drafted, *_ = json.loads((folder / "results.json").read_text())["results"]
    assert plain["head_calls"] == tiny_latent.STEPS and plain["ar_calls"] == 1 and plain["speed_up"] == 1
    assert drafted["draft_head_calls"] > 0 and 0 < drafted["bound"] < 1
    assert len(drafted["accepted_by_step"]) == len(drafted["bound_by_step"]) == tiny_latent.STEPS
    assert all((folder / name).stat().st_size > 1000 for name in ("results.png", "steps.png"))
    with pytest.raises(InputError, match="models of continuous tokens"):
        bench("bench.count=1", f"target={sample_path()}")


def test_the_shipped_sample_is_what_recipes_for_continuous_tokens_draw_with() -> None:
    pipe = polyspec.pipeline("image", recipe="reflection")
    assert isinstance(pipe, ContinuousPipeline) and pipe.draft is not None
    (heart,) = pipe("red heart", seed=0).outputs
    red, green, blue = torch.from_numpy(np.array(heart)).float().movedim(-1, 0)
    inside = (red > 150) & (green < 100) & (blue < 110)
    assert 0.3 < inside.float().mean() < 0.8, "a red heart fills about half of the picture"
    assert red[0, 0] > 230 and green[0, 0] > 230, "on white"


def pictures_file(path: Path) -> Path:
    """Eight pictures in the training file's format."""
    rows = []
    for i in range(8):
        data = io.BytesIO()
        Image.new("RGB", (64, 64), (30 * i, 100, 255 - 30 * i)).save(data, "PNG")
        rows.append({"image": {"bytes": data.getvalue()}, "caption": "red heart", "style": "plain", "group": "objects",
                     "subgroup": "shapes", "split": "train"})  # fmt: skip
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("order", ["raster", "random"])
def test_training_writes_a_target_that_draws_and_goes_on_where_it_stopped(tmp_path: Path, order: str) -> None:
    config = OmegaConf.load(Path(str(polyspec.conf.__file__)).with_name("train") / "image_continuous.yaml")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_size": 16, "head_layers": 1}
    config.merge_with(
        {
            "data": {"path": str(pictures_file(tmp_path / "pictures.parquet"))},
            "vae": {"budget": {"steps": 2, "minutes": None}, "channels": [8, 8, 8, 8], "batch": 2},
            "drawn": {"styles": ["plain"], "names": None},
            "schedules": {name: {"steps": 2, "minutes": None, "batch": 2, "seed": 0} for name in ("target", "draft")},
            "sampler": {"denoising_steps": 3, "order": order},
            "target": small,
            "draft": small,
            "output": str(tmp_path / "out"),
            "device": "cpu",
            "seed": 0,
        }
    )
    module, _, function = config.entry.partition(":")
    train = getattr(import_module(module), function)
    folder = train(config)
    first = LatentImageModel.from_pretrained(folder).state_dict()
    again = LatentImageModel.from_pretrained(train(config)).state_dict()  # the budget is spent: nothing moves
    assert all(torch.equal(first[k], again[k]) for k in first)
    made = polyspec.pipeline("image", target=str(folder), device="cpu", overrides={"length": 2})
    result = made("red heart", seed=0)
    assert made.method.recipe.name == "reflection" and result.outputs[0].size == (64, 64)
    assert result.stats.draft_calls > 0, "the folder's draft model is taken"
