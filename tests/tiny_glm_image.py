"""A randomly initialised GLM-Image autoregressive stage, and a whole diffusers pipeline around it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

CODES = 16
# as in GLM-Image, the drawable tokens come first: codes, start and end of an image, and some that mean nothing
SPECIAL = {"pad_token": "<pad>", "image_token": "<image>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}
NAMES = [*(f"<code {i}>" for i in range(CODES)), "<boi>", "<eoi>", "<17>", "<18>", *SPECIAL.values(), "<unk>"]
NAMES += ["red", "blue", "heart", "star", "<user>", *"0123456789"]
START, END, DRAWABLE = NAMES.index("<boi>"), NAMES.index("<eoi>"), NAMES.index("<pad>")
SIDE = 32  # pixels of the smallest picture: one token


@cache
def tiny_glm_image() -> GlmImageForConditionalGeneration:
    """In float32, peaked enough that near-ties do not decide."""
    torch.manual_seed(1)
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(NAMES),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "vision_vocab_size": DRAWABLE,
            "pad_token_id": NAMES.index("<pad>"),
            "eos_token_id": END,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": (1, 2, 1)},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 16,
        },
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=NAMES.index("<image>"),
        image_start_token_id=START,
        image_end_token_id=END,
    )
    model = GlmImageForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
        model.lm_head.weight[CODES:].mul_(0.1)
        model.get_input_embeddings().weight.mul_(20)
        for layer in model.model.language_model.layers:  # attention that feels where it looks
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=NAMES.index("<pad>"), do_sample=True)
    return model


def request(prompts: list[str], grids: list[list[int]], pictures: int = 0) -> dict[str, Any]:
    """What the pipeline hands to `generate`: prompts padded on the left, `grids` of (rows, columns) a prompt of which the
    last ones are to be drawn. pictures: source pictures before each prompt, of the first grids' sizes."""
    rows = []
    for prompt in prompts:
        row = []
        for _, height, width in grids[:pictures]:
            row += [START, *[NAMES.index("<image>")] * (height * width), END]
        rows.append([*row, *(NAMES.index(w) for w in prompt.split()), START])
    width = max(map(len, rows))
    pad = NAMES.index("<pad>")
    inputs = {
        "input_ids": torch.tensor([[pad] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        "image_grid_thw": torch.tensor(grids * len(prompts)),
        "images_per_sample": torch.tensor([len(grids)] * len(prompts)),
    }
    if pictures:
        patches = sum(height * width for _, height, width in grids[:pictures]) * len(prompts)
        inputs["pixel_values"] = torch.randn(patches, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
    return inputs


@cache
def tiny_pipeline() -> GlmImagePipeline:
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<unk>"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", unk_token="<unk>", bos_token="<boi>", **SPECIAL
    )
    template = (
        "{% for m in messages %}<user> {% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=template)
    torch.manual_seed(0)
    text = T5Config(vocab_size=384, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=processor,
        text_encoder=T5EncoderModel(text).eval(),
        vision_language_encoder=tiny_glm_image(),
        vae=AutoencoderKL(
            block_out_channels=(4, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=128,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        transformer=GlmImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=DRAWABLE,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
