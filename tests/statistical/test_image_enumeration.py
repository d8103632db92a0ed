"""Sampling behind an image draws from the model's own distribution, end to end through loop and cache.

A LLaVA with five tokens, one of them the placeholder that nobody may draw, generates three behind one of two pictures.
The distribution over all sequences is enumerated by plain forward passes. Then drafters that report another q than they
drew from, and a target that looks at the wrong picture, have to fail the same test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gtest import g_test
from recipe_needs import by_name, overrides
from tiny_models import llama, sharpen
from tiny_vlms import CLIP, TEXT
from torch import Tensor

import polyspec
from polyspec.drafting import Draft
from polyspec.drafting.ibed import Ibed
from polyspec.drafting.image_views import ImageAdapter, ImageAdapterConfig
from polyspec.drafting.tabed import Tabed
from polyspec.recipe import Recipe, find_recipe
from polyspec.target import Target

VOCAB, LENGTH, IMAGE = 5, 3, 4
PROMPT = [1, *[IMAGE] * 4, 2, 3]
THRESHOLD, BATCH, SAMPLES, FEWER = 1e-6, 5_000, 100_000, 10_000
NAMES = ("speculative_sampling", "prompt_lookup", "eagle", "dflash", "text_only_draft", "ibed", "tabed")


@cache
def model() -> Any:
    torch.manual_seed(2)
    text = {**TEXT, "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 8, "num_key_value_heads": 4}
    config = transformers.AutoConfig.for_model(
        "llava", vision_config=CLIP, text_config={**text, "head_dim": 2}, image_token_index=IMAGE, image_seq_length=4
    )
    return sharpen(transformers.AutoModelForImageTextToText.from_config(config), 1.8).eval()


@cache
def pictures() -> Tensor:
    return 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@cache
@torch.no_grad()
def exact_distribution(picture: int) -> np.ndarray:
    """Probability of every sequence `[VOCAB] * LENGTH` behind a picture."""
    prefixes = torch.cartesian_prod(*[torch.arange(IMAGE)] * (LENGTH - 1))
    rows = torch.cat([torch.tensor(PROMPT).expand(len(prefixes), -1), prefixes], dim=1)
    pixels = pictures()[picture].expand(len(rows), -1, -1, -1)
    logits = model()(input_ids=rows, pixel_values=pixels).logits[:, len(PROMPT) - 1 :].double()
    probs = logits[..., :IMAGE].softmax(-1)
    first, second, third = probs[0, 0], probs[:: IMAGE ** (LENGTH - 2), 1], probs[:, 2].view(IMAGE, IMAGE, IMAGE)
    return (first[:, None, None] * second[..., None] * third).numpy()


def draw(fast: polyspec.CustomGenerate, samples: int) -> Tensor:
    """`samples` sequences `[2, samples, LENGTH]`, both pictures side by side in every batch."""
    copies, drawn = BATCH // 2, []
    for number in range(samples // copies):
        fast.seed = 10**6 * number + 17
        out = model().generate(
            input_ids=torch.tensor([PROMPT]).expand(BATCH, -1),
            pixel_values=pictures().repeat(copies, 1, 1, 1),
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH,
            suppress_tokens=[IMAGE],
            eos_token_id=None,
            pad_token_id=0,
            custom_generate=fast,
        )
        drawn.append(out[:, len(PROMPT) :].view(copies, 2, LENGTH).transpose(0, 1))
    return torch.cat(drawn, dim=1)


def fit(sequences: Tensor, expected: np.ndarray) -> float:
    """The least p-value of a G-test on the first 1, 2, … LENGTH tokens."""
    flat = np.ravel_multi_index(sequences.T.numpy(), expected.shape)
    counts = np.bincount(flat, minlength=expected.size).reshape(expected.shape)
    axes = [tuple(range(length, LENGTH)) for length in range(1, LENGTH + 1)]
    return min(g_test(counts.sum(rest), expected.sum(rest)) for rest in axes)


def p_value(fast: polyspec.CustomGenerate, samples: int) -> float:
    return min(fit(rows, exact_distribution(picture)) for picture, rows in enumerate(draw(fast, samples)))


def made(recipe: Recipe, **knobs: Any) -> polyspec.CustomGenerate:
    torch.manual_seed(8)
    drafter = sharpen(llama(vocab=VOCAB, hidden=8), 1.5).eval()
    adapter = ImageAdapter(ImageAdapterConfig(feature_size=8, hidden_size=8, output_size=8)).eval()
    adapter.second.weight.data *= 10  # else the image would hardly show
    given = {"draft_model": drafter, "image_adapter": adapter, "captioner": lambda row, image: [row % 4, 1]}
    given = {k: v for k, v in given.items() if k in (*recipe.needs, *recipe.takes)}
    return polyspec.custom_generate(recipe.name, **{**overrides(recipe, model()), "length": 2, **given, **knobs})


@pytest.mark.parametrize("samples", [FEWER, pytest.param(SAMPLES, marks=pytest.mark.slow)])
@by_name([find_recipe(name) for name in NAMES])
def test_sequences_behind_an_image_have_the_models_distribution(recipe: Recipe, samples: int) -> None:
    fast = made(recipe)
    assert p_value(fast, samples) > THRESHOLD
    assert 0.02 < fast.stats.acceptance_rate < 0.98


def test_the_pictures_have_distributions_of_their_own() -> None:
    drawn = draw(made(find_recipe("text_only_draft")), FEWER)
    assert fit(drawn[0], exact_distribution(1)) < THRESHOLD


Patch = Callable[[pytest.MonkeyPatch], str]


def the_ensemble_reports_one_drafts_distribution(patch: pytest.MonkeyPatch) -> str:
    mix, propose, seen = Ibed.mix, Ibed.propose, []

    def remembered(self: Any, logits: Tensor) -> Tensor:
        seen.append(logits[: len(logits) // self.copies, -1:, :].clone().index_fill_(-1, torch.tensor([IMAGE]), -1e9))
        return mix(self, logits)

    def wrong(self: Any, count: int) -> Draft:
        seen.clear()
        return Draft(propose(self, count).tokens, torch.cat(seen, dim=1).softmax(-1))

    patch.setattr(Ibed, "mix", remembered)
    patch.setattr(Ibed, "propose", wrong)
    return "ibed"


def weights_that_favour_the_drawn_token_are_reported(patch: pytest.MonkeyPatch) -> str:
    mix, propose, seen = Ibed.mix, Ibed.propose, []

    def remembered(self: Any, logits: Tensor) -> Tensor:
        allowed = logits[:, -1:].clone().index_fill_(-1, torch.tensor([IMAGE]), -1e9)
        seen.append(allowed.softmax(-1).unflatten(0, (self.copies, -1)))
        return mix(self, logits)

    def wrong(self: Any, count: int) -> Draft:
        seen.clear()
        tokens = propose(self, count).tokens
        every = torch.cat(seen, dim=2)  # [K, B, N, V]
        best = every.gather(3, tokens.expand(len(every), -1, -1)[..., None]).argmax(0)
        return Draft(tokens, every.gather(0, best.expand(*best.shape[:2], VOCAB)[None])[0])

    patch.setattr(Ibed, "mix", remembered)
    patch.setattr(Tabed, "propose", wrong)
    return "tabed"


def the_target_sees_the_picture_of_another_row(patch: pytest.MonkeyPatch) -> str:
    run_prompt = Target.run_prompt

    def wrong(self: Target, tokens: Tensor) -> Any:
        encoded = self.given.once.get("mm_encoder_outputs")
        if encoded:
            features = encoded["image"].pooler_output
            encoded["image"].pooler_output = features.roll(1, 0) if isinstance(features, Tensor) else features[::-1]
        return run_prompt(self, tokens)

    patch.setattr(Target, "run_prompt", wrong)
    return "text_only_draft"


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(the_ensemble_reports_one_drafts_distribution, marks=pytest.mark.slow),
        weights_that_favour_the_drawn_token_are_reported,
        the_target_sees_the_picture_of_another_row,
    ],
    ids=lambda f: f.__name__,
)
def test_a_mistake_is_noticed(wrong: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = find_recipe(wrong(monkeypatch))
    assert p_value(made(recipe), FEWER) < THRESHOLD
