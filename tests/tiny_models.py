"""Randomly initialised models small enough for tests: one of each kind of architecture that decoding must respect."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCAB = 61
PAD, EOS = 0, 1
COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
DECODER = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def llama(vocab: int = VOCAB, layers: int = 2, hidden: int = 32, heads: int = 4) -> PreTrainedModel:
    sizes = {"vocab_size": vocab, "num_hidden_layers": layers, "hidden_size": hidden, "head_dim": hidden // heads}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, **sizes}))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**DECODER))


def gpt2() -> PreTrainedModel:
    """Absolute positions, learnt."""
    return GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=256))


def gemma3() -> PreTrainedModel:
    """Sliding and full attention by turns; the window is shorter than what the tests generate."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**DECODER, "num_hidden_layers": 3},
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=8,
        )
    )


def mistral() -> PreTrainedModel:
    """Sliding attention in every layer."""
    return MistralForCausalLM(MistralConfig(**DECODER, sliding_window=6))


def mixtral() -> PreTrainedModel:
    """A mixture of experts: a token's result must not depend on which others are in the call."""
    return MixtralForCausalLM(
        MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    )


def t5() -> PreTrainedModel:
    """Encoder-decoder without position ids: rows can only advance together."""
    return T5ForConditionalGeneration(
        T5Config(
            **{**COMMON, "decoder_start_token_id": PAD},
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            tie_word_embeddings=False,
        )
    )


def whisper() -> PreTrainedModel:
    """Encoder-decoder with learnt decoder positions."""
    return WhisperForConditionalGeneration(
        WhisperConfig(
            **{**COMMON, "decoder_start_token_id": 2},
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=128,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    f.__name__: f for f in (llama, qwen3, gpt2, gemma3, mistral, mixtral, t5, whisper)
}


def sharpen(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    """Give next-token logits a standard deviation of about `scale`, so that no two of them nearly tie.

    Greedy continuations then depend on the last few tokens mostly and fall into (long) loops, as real text half does.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                fan_in = 1.0 if "embed" in name or "shared" in name or "wte" in name or "wpe" in name else parameter.shape[-1]
                parameter.normal_(0, fan_in**-0.5)
        old = model.get_output_embeddings()
        head = nn.Linear(old.in_features, old.out_features, bias=False)
        head.weight.normal_(0, scale * head.in_features**-0.5)
        model.set_output_embeddings(head)
        model.config.tie_word_embeddings = False
    return model


def build(family: str, seed: int = 0, scale: float = 6.0, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return sharpen(FAMILIES[family](**sizes), scale).eval()


@cache
def target(family: str) -> PreTrainedModel:
    return build(family)


def noisy_copy(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """The model with every weight matrix perturbed by `noise` times its spread: a drafter that is right at times."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim >= 2:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other
