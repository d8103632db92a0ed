"""Bark's semantic and coarse stages say the same with recipes, on small random models in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import BarkCoarseConfig, BarkCoarseModel, BarkSemanticConfig, BarkSemanticModel
from transformers.models.bark.generation_configuration_bark import (
    BarkCoarseGenerationConfig,
    BarkSemanticGenerationConfig,
)

import polyspec

SIZES = {"block_size": 256, "num_layers": 2, "num_heads": 2, "hidden_size": 16}
RECIPES = ["autoregressive", "prompt_lookup", "lookahead", "early_exit"]
SEMANTIC = BarkSemanticGenerationConfig(
    semantic_pad_token=50,
    semantic_vocab_size=50,
    eos_token_id=50,
    max_input_semantic_length=8,
    text_encoding_offset=52,
    text_pad_token=110,
    semantic_infer_token=111,
    max_new_tokens=30,
    do_sample=False,
)
COARSE = BarkCoarseGenerationConfig(
    coarse_semantic_pad_token=118,
    coarse_rate_hz=75,
    n_coarse_codebooks=2,
    coarse_infer_token=119,
    max_coarse_input_length=8,
    max_coarse_history=30,
    sliding_window_len=10,
    do_sample=False,
)


def sharp(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                spread = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.normal_(0, 6 * spread if "lm_head" in name else spread)
    return model.eval()


def fast(name: str) -> polyspec.CustomGenerate:
    knobs = {"length": 4} if name in ("prompt_lookup", "early_exit") else {}
    return polyspec.custom_generate(name, **knobs)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_the_semantic_stage_says_its_own_tokens(name: str, rows: int) -> None:
    model = sharp(BarkSemanticModel(BarkSemanticConfig(input_vocab_size=120, output_vocab_size=60, **SIZES)))
    text = torch.randint(0, 50, (rows, 8))
    own, method = model.generate(text, SEMANTIC), fast(name)
    assert torch.equal(model.generate(text, SEMANTIC, custom_generate=method), own)
    assert own.unique().numel() > 5 and (method.stats.proposed_tokens > 0 or name in ("autoregressive", "lookahead"))
    other = model.generate(text.flip(1), SEMANTIC, custom_generate=fast(name))
    assert other.shape != own.shape or not torch.equal(other, own), "the prompt's embeddings are seen"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_the_coarse_stage_says_its_own_tokens(name: str, rows: int) -> None:
    model = sharp(BarkCoarseModel(BarkCoarseConfig(input_vocab_size=120, output_vocab_size=120, **SIZES)))
    said = torch.randint(0, 50, (rows, 12))
    own = model.generate(said, SEMANTIC, COARSE, codebook_size=30)
    assert torch.equal(model.generate(said, SEMANTIC, COARSE, codebook_size=30, custom_generate=fast(name)), own)
