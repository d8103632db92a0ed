"""A randomly initialised Janus with 16 image tokens, and the processor that goes with it."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<boi>", "<eoi>", "<image>", "red", "blue", "heart", "star", "car"]
CODES, SIDE, HIDDEN = 12, 4, 32


@cache
def tiny_janus() -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """(model in float32, processor): 4×4 tokens out of 12, peaked enough that near-ties do not decide."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    image = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special, **image)
    torch.manual_seed(3)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=16,
            patch_size=4,
            mlp_ratio=1.0,
            projection_dim=HIDDEN,
            depth=1,
            num_image_tokens=SIDE * SIDE,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=4,
            num_embeddings=CODES,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=SIDE,
            projection_dim=HIDDEN,
            image_token_embed_dim=HIDDEN,
        ),
        image_token_id=6,
    )
    model = JanusForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.model.generation_head.vision_head.weight.mul_(40)
        model.model.generation_embeddings.weight.mul_(20)
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        generation_kwargs={"boi_token_id": 4},
        do_sample=False,
        guidance_scale=3.0,
    )
    picture = JanusImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model, JanusProcessor(picture, tokenizer, num_image_tokens=SIDE * SIDE)
