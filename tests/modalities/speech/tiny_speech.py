"""A random model of the speech sample's kind, and codecs of transformers, small enough for tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny_models import build
from transformers import DacConfig, DacModel, MimiConfig, MimiModel, PreTrainedModel

from polyspec.modalities.speech.codec import SpeechCodec, SpeechCodecConfig
from polyspec.modalities.speech.phonemes import new_tokenizer

CODES, ALPHABET = 24, "əhlOɡʊdmˈɔɹnɪŋ.?! ʧAnIktʌæsz"


def tiny_codec(codes: int = CODES, phonemes: int = len(ALPHABET) + 1) -> SpeechCodec:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 16, "code_size": 4, "n_fft": 48, "hop": 12, "mels": 10, "sample_rate": 4000}
    return SpeechCodec(SpeechCodecConfig(codes=codes, phonemes=phonemes, **sizes)).eval()


@cache
def tiny_speech() -> tuple[PreTrainedModel, Any, SpeechCodec]:
    """(model, tokenizer, codec) as the pipeline takes them."""
    tokenizer = new_tokenizer(CODES, "".join(dict.fromkeys(ALPHABET)), durations=4)
    model = build("llama", vocab=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, tiny_codec(phonemes=len(dict.fromkeys(ALPHABET)) + 1)


def tiny_mimi() -> MimiModel:
    torch.manual_seed(0)
    return MimiModel(
        MimiConfig(
            hidden_size=16,
            num_filters=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=16,
            codebook_size=8,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_quantizers=3,
            num_semantic_quantizers=1,
            upsampling_ratios=[2, 2],
            upsample_groups=16,
            sampling_rate=400,
        )
    ).eval()


def tiny_dac() -> DacModel:
    torch.manual_seed(0)
    return DacModel(
        DacConfig(
            encoder_hidden_size=4,
            decoder_hidden_size=16,
            downsampling_ratios=[2, 2],
            n_codebooks=2,
            codebook_size=8,
            codebook_dim=4,
            sampling_rate=400,
        )
    ).eval()
