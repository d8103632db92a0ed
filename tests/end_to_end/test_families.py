"""Every architecture decodes as `generate` does, or is refused with a reason: there is no third outcome."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCAB, sharpen
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import polyspec

IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32}
ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
BART = {**DECODER, **ENCODER, "max_position_embeddings": 256, "decoder_start_token_id": 2, "forced_eos_token_id": None}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {**SIZES, "sliding_window": 6}
PLAIN = (
    "gemma", "phi", "cohere", "olmo2", "olmoe", "qwen2", "glm", "glm4", "smollm3", "granite", "nemotron", "helium",
    "ernie4_5", "bitnet", "diffllama", "apertus", "seed_oss", "hunyuan_v1_dense", "arcee", "doge",
)  # fmt: skip
WINDOWED = ("phi3", "gemma2", "cohere2", "starcoder2", "exaone4", "olmo3", "mistral")

CAUSAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(PLAIN, SIZES),
    **dict.fromkeys(WINDOWED, WINDOW),
    **{key: {**SIZES, "num_key_value_heads": 4} for key in ("gpt_neox", "stablelm", "persimmon")},
    **dict.fromkeys(("gpt_bigcode", "ctrl"), OLD),
    **{key: {**OLD, "rotary_dim": 4} for key in ("gptj", "codegen")},
    "gpt_oss": {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "llama4_text": {**SIZES, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 7},
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**SIZES, **EXPERTS},
    "deepseek_v2": {
        **SIZES,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "moe_intermediate_size": 16,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": SIZES,
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 256},
    "mpt": {"use_cache": True, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "blenderbot", "m2m_100"), BART),
    **{key: {**T5, "decoder_start_token_id": 0, "tie_word_embeddings": False} for key in ("mt5", "umt5", "longt5")},
    "led": {**BART, "attention_window": 4},
}
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
        "max_position_embeddings": 256,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "minimax": {**SIZES, "num_local_experts": 2},
    "falcon_h1": SIZES,
}


def built(name: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(name, **{**IDS, **sizes}))
    model.generation_config.max_length = None
    return sharpen(model, 6.0).eval()


def generate(model: Any, rows: int, **options: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :7] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return model.generate(
        ids[:rows], attention_mask=mask[:rows], do_sample=False, max_new_tokens=20, pad_token_id=0, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_an_architecture_decodes_as_generate_does(name: str) -> None:
    model = built(name, {**CAUSAL, **SEQ2SEQ}[name])
    for rows in (1, 4):
        expected = generate(model, rows)
        for recipe, knobs in (("autoregressive", {}), ("prompt_lookup", {"length": 4}), ("gumbel_jacobi", {"window": 6})):
            fast = polyspec.custom_generate(recipe, **knobs)
            assert torch.equal(generate(model, rows, custom_generate=fast), expected), recipe
        try:
            got = generate(model, rows, custom_generate=polyspec.custom_generate("lookahead"))
        except polyspec.UnsupportedModelError as error:
            assert "position ids" in str(error)
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_whose_drafts_cannot_be_checked_is_refused(name: str) -> None:
    model = built(name, REFUSED[name])
    with pytest.raises(polyspec.UnsupportedModelError, match=type(model).__name__):
        generate(model, 1, custom_generate=polyspec.custom_generate("autoregressive"))
