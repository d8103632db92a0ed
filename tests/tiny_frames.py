"""Random text-to-speech models that say several codes a step, small enough for tests, with processors of their own kind."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CsmConfig,
    CsmForConditionalGeneration,
    CsmProcessor,
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    DiaConfig,
    DiaFeatureExtractor,
    DiaForConditionalGeneration,
    DiaProcessor,
    DiaTokenizer,
    EncodecFeatureExtractor,
    GenerationConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz .,'[]0123456789"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MIMI: dict[str, Any] = {
    "model_type": "mimi",
    "hidden_size": 16,
    "num_filters": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "codebook_size": 8,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 4,
    "num_semantic_quantizers": 1,
    "upsampling_ratios": [2, 2],
    "upsample_groups": 16,
    "sampling_rate": 400,
}


def letters(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters behind <pad>, <bos> and the `special` tokens; <bos> begins a text."""
    known = ["<pad>", "<bos>", *special]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*known, *LETTERS])}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", extra_special_tokens=list(special)
    )


def spread(model: PreTrainedModel, seed: int, sharpness: float = 1.5) -> Any:
    """Random weights under which logits are neither flat nor the same at every step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "codec" not in name:
                parameter.normal_(0, sharpness * parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def noisy(model: PreTrainedModel, noise: float) -> Any:
    """A copy of `model` with `noise` on its weights: a draft model that is right often, not always."""
    import copy

    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return other


@cache
def tiny_csm(frame: int = 4, codes: int = 9) -> tuple[CsmForConditionalGeneration, CsmProcessor]:
    """(model, processor): `frame` codebooks of `codes` codes each."""
    torch.manual_seed(0)
    tokenizer = letters("<|AUDIO|>", "<|audio_eos|>")
    depth = {**SIZES, "hidden_size": 16, "head_dim": 4, "max_position_embeddings": frame + 1}
    config = CsmConfig(
        num_codebooks=frame,
        vocab_size=codes,
        text_vocab_size=len(tokenizer),
        codebook_pad_token_id=codes - 1,
        codebook_eos_token_id=0,
        pad_token_id=0,
        bos_token_id=1,
        audio_token_id=2,
        audio_eos_token_id=3,
        max_position_embeddings=64,
        depth_decoder_config={**depth, "num_codebooks": frame, "backbone_hidden_size": 32, "vocab_size": codes},
        codec_config={**MIMI, "num_quantizers": frame},
        **SIZES,
    )
    model = spread(CsmForConditionalGeneration(config), 1)
    model.generation_config.do_sample = False
    return model, CsmProcessor(EncodecFeatureExtractor(sampling_rate=400), tokenizer)


@cache
def tiny_higgs(frame: int = 3, codes: int = 6) -> tuple[HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Processor]:
    """(model, processor): `frame` codebooks of `codes` codes each, and two more for the ends of the stream."""
    torch.manual_seed(0)
    tokenizer = letters("<|AUDIO_OUT|>", "<|audio_out_bos|>", "<|audio_eos|>", "<delay>", "<end>")
    config = HiggsAudioV2Config(
        num_codebooks=frame,
        codebook_size=codes + 2,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=1,
        audio_token_id=2,
        audio_bos_token_id=3,
        audio_delay_token_id=5,
        eos_token_id=6,
        audio_stream_bos_id=codes,
        audio_stream_eos_id=codes + 1,
        max_position_embeddings=96,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **SIZES,
    )
    model = spread(HiggsAudioV2ForConditionalGeneration(config), 8)
    with torch.no_grad():  # not too soon an end
        model.audio_lm_head.weight.view(frame, codes + 2, -1)[:, -1] *= 0.6
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=6, pad_token_id=0)
    codec = HiggsAudioV2TokenizerConfig(
        sample_rate=400,
        semantic_sample_rate=400,
        downsample_factor=4,
        codebook_size=8,
        codebook_dim=4,
        target_bandwidths=[0.3 * frame + 0.01],
        acoustic_model_config={
            "model_type": "dac",
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 16,
            "downsampling_ratios": [2, 2],
            "upsampling_ratios": [2, 2],
            "hidden_size": 16,
        },
        semantic_model_config={
            "model_type": "hubert",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "conv_dim": [8, 8],
            "conv_kernel": [2, 2],
            "conv_stride": [2, 2],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    )
    return model, HiggsAudioV2Processor(
        DacFeatureExtractor(sampling_rate=400, hop_length=4),
        tokenizer,
        HiggsAudioV2TokenizerModel(codec).eval(),
        chat_template="{% for m in messages %}{% for c in m['content'] %}{% if m['role'] == 'user' %}{{ c['text'] }}"
        "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<|audio_out_bos|>{% endif %}",
        audio_delay_token="<delay>",
        audio_stream_bos_id=codes,
        audio_stream_eos_id=codes + 1,
    )


@cache
def tiny_dia(guidance: float | None = 2.0) -> tuple[DiaForConditionalGeneration, DiaProcessor]:
    """(model, processor): three channels of eight codes."""
    torch.manual_seed(0)
    config = DiaConfig(
        delay_pattern=[0, 2, 3],
        encoder_config={**SIZES, "vocab_size": 256, "max_position_embeddings": 64},
        decoder_config={
            **SIZES,
            "vocab_size": 12,
            "num_channels": 3,
            "eos_token_id": 8,
            "pad_token_id": 9,
            "bos_token_id": 10,
            "cross_hidden_size": 32,
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 2,
            "cross_head_dim": 8,
            "max_position_embeddings": 64,
        },
    )
    model = spread(DiaForConditionalGeneration(config), 1)
    model.generation_config = GenerationConfig(
        do_sample=False, guidance_scale=guidance, top_k=5, bos_token_id=10, eos_token_id=8, pad_token_id=9
    )
    codec = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=16,
        downsampling_ratios=[2, 2],
        n_codebooks=3,
        codebook_size=8,
        codebook_dim=4,
        sampling_rate=400,
    )
    extractor = DiaFeatureExtractor(sampling_rate=400, hop_length=4)
    return model, DiaProcessor(extractor, DiaTokenizer(), DacModel(codec).eval())
