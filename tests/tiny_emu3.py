"""A randomly initialised Emu3 with a codebook of 12, the processor that goes with it, and how transformers has it draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

CODES, HEIGHT, WIDTH = 12, 3, 4
SIZE = (HEIGHT * 8, WIDTH * 8)
SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
WORDS = [
    *SPECIAL.values(),
    "<|extra_200|>",
    "red",
    "blue",
    "heart",
    "star",
    "car",
    "lowres",
    "blurry",
    "*",
    *"0123456789",
]
# not in the order of the codes, and not in one stretch: nothing may depend on either
VISUAL = [f"<|visual token {code:06d}|>" for code in (*range(7, CODES), *range(7))]
NAMES = [*WORDS, *VISUAL[:5], "<gap>", *VISUAL[5:]]
EOL, EOF, EOI, EOS, PAD = (NAMES.index(n) for n in ("<|extra_200|>", "<|extra_201|>", "<|image end|>", "</s>", "<pad>"))


@cache
def tiny_emu3(layers: int = 2) -> tuple[Emu3ForConditionalGeneration, Emu3Processor]:
    """(model in float32, processor): peaked enough that near-ties do not decide."""
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<unk>"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **SPECIAL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra_200|>", "*"]})
    torch.manual_seed(5)
    config = Emu3Config(
        vq_config=Emu3VQVAEConfig(
            codebook_size=CODES,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            hidden_size=32,
        ),
        text_config=Emu3TextConfig(
            vocab_size=len(NAMES),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=96,
            pad_token_id=PAD,
            bos_token_id=NAMES.index("<s>"),
            eos_token_id=EOS,
        ),
        vocabulary_map={name: i for i, name in enumerate(NAMES)},
    )
    model = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        model.get_input_embeddings().weight.mul_(20)
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, do_sample=False)
    return model, Emu3Processor(Emu3ImageProcessor(), tokenizer)


def allowed_tokens(model: Any, processor: Any, height: int, width: int) -> Callable[[int, Tensor], list[int]]:
    """The `prefix_allowed_tokens_fn` of transformers' documentation of Emu3."""
    wrapper, codes = processor.tokenizer.image_wrapper_token_id, model.vocabulary_mapping.image_tokens

    def allowed(row: int, ids: Tensor) -> list[int]:
        done = len(ids) - int((ids == wrapper).nonzero()[0, 0])
        if done > (width + 1) * height:
            return [([EOF, EOI, EOS] + [PAD] * 99)[done - (width + 1) * height - 1]]
        return [EOL] if done % (width + 1) == 0 else codes

    return allowed


def own_tokens(prompts: Sequence[str], guidance_scale: float, negative: str, **knobs: Any) -> Tensor:
    """What the model's own `generate` draws, in the model's ids `[B, HEIGHT · (WIDTH + 1) + 3]`."""
    model, processor = tiny_emu3()
    form = {"return_for_image_generation": True, "padding": True, "return_tensors": "pt"}
    form |= {"ratio": f"{WIDTH}:{HEIGHT}", "image_area": SIZE[0] * SIZE[1]}
    inputs, other = processor(text=list(prompts), **form), processor(text=[negative] * len(prompts), **form)
    (height, width), *_ = inputs.pop("image_sizes")
    if guidance_scale > 1:
        knobs |= {
            "guidance_scale": guidance_scale,
            "negative_prompt_ids": other["input_ids"],
            "negative_prompt_attention_mask": other["attention_mask"],
        }
    allowed = allowed_tokens(model, processor, int(height), int(width))
    out = model.generate(**inputs, max_new_tokens=50, prefix_allowed_tokens_fn=allowed, **{"do_sample": False, **knobs})
    return out[:, inputs["input_ids"].shape[1] :]
