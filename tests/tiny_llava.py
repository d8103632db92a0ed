"""A LLaVA small enough for tests, with a word-level tokenizer and a processor, as a loaded pair or in a folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from PIL import Image
from tiny_models import sharpen
from tiny_vlms import CLIP, TEXT

from polyspec.modalities.vision_language.sample import PLACEHOLDER, TEMPLATE

WORDS = (
    "what", "is", "in", "the", "picture", "give", "keywords", "for", "a", "red", "heart", "blue", "star", "green", "tree",
    "answer", "user", "assistant",
)  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", PLACEHOLDER, "<unk>"]


def tokenizer() -> Any:
    table = {word: number for number, word in enumerate([*SPECIAL, *WORDS, ".", "?", ","])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.Punctuation()]
    )
    words.normalizer = tokenizers.normalizers.Lowercase()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=SPECIAL[0], eos_token=SPECIAL[2], unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[1], PLACEHOLDER]})
    return fast


def processor() -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8}),
        tokenizer=tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="full",
        image_token=PLACEHOLDER,
        chat_template=TEMPLATE,
    )


def text_config(size: int) -> dict[str, Any]:
    return {
        **TEXT,
        "model_type": "llama",
        "vocab_size": size,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }


@cache
def llava() -> tuple[Any, Any]:
    """(model, processor): four placeholders a picture."""
    torch.manual_seed(0)
    made = processor()
    config = transformers.AutoConfig.for_model(
        "llava",
        vision_config={**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text_config(len(made.tokenizer)),
        image_token_index=3,
        image_seq_length=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return sharpen(transformers.LlavaForConditionalGeneration(config), 6.0).eval(), made


def save_llava(folder: Path) -> Path:
    model, made = llava()
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_language(folder: Path) -> Path:
    """A language model and its tokenizer, for vision towers to be trained for."""
    torch.manual_seed(1)
    fast = tokenizer()
    sharpen(transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config(len(fast)))), 3.0).save_pretrained(
        folder
    )
    fast.save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (12, 9)) -> Image.Image:
    noise = torch.randint(
        0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(noise.numpy())
