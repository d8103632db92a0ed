"""Greedy decoding of real weights: SmolLM2-135M-Instruct in float32 gives the tokens of `model.generate`.

The chat prompts differ in length, so a batch of them is padded on the left. Trained heads are used where the library
ships them, untrained ones elsewhere: identity holds for any.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from recipe_needs import by_name, overrides, text_recipes
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import polyspec
from polyspec.modalities.text.sample import load_sample
from polyspec.prompts import load_prompts
from polyspec.recipe import Recipe

PROMPTS, NEW_TOKENS = 16, 64
NEAR_TIE = 1e-4
"""Two logits closer than this are decided by rounding: their order differs between two forwards of the model itself."""

pytestmark = pytest.mark.slow


@cache
def sample() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_sample(torch.float32)


@cache
def batches(size: int) -> list[dict[str, Tensor]]:
    _, tokenizer = sample()
    chats = [[{"role": "user", "content": text}] for text in load_prompts("chat")[:PROMPTS]]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    given = [tokenizer(texts[i : i + size], return_tensors="pt", padding=True) for i in range(0, PROMPTS, size)]
    return [{k: g[k] for k in ("input_ids", "attention_mask")} for g in given]


def generate(given: dict[str, Tensor], **options: Any) -> Any:
    model, tokenizer = sample()
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.pad_token_id}
    return model.generate(**given, **settings, **options)


@cache
def expected(size: int) -> list[Tensor]:
    return [generate(given) for given in batches(size)]


@pytest.mark.parametrize("size", [1, 4])
@by_name(text_recipes())
def test_greedy_tokens_of_real_weights_are_those_of_generate(recipe: Recipe, size: int) -> None:
    model, _ = sample()
    fast = polyspec.custom_generate(recipe.name, seed=0, **overrides(recipe, model))
    for given, reference in zip(batches(size), expected(size), strict=True):
        assert torch.equal(generate(given, custom_generate=fast), reference)


def test_no_prompt_is_decided_by_rounding() -> None:
    """The comparison above is fair: along every reference the two likeliest tokens are further apart than rounding."""
    model, _ = sample()
    for given, reference in zip(batches(1), expected(1), strict=True):
        with torch.no_grad():
            logits = model(reference).logits[0, given["input_ids"].shape[1] - 1 : -1]
        best = logits.topk(2, dim=-1).values
        assert (best[:, 0] - best[:, 1]).min() > NEAR_TIE
