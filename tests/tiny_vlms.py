"""Randomly initialised vision-language models small enough for tests, and prompts with images for them.

Token ids and pixel values are made directly, as a processor would: placeholders where features of an image will stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from tiny_models import sharpen
from torch import Tensor

VOCAB, IMAGE, PAD, EOS = 61, 60, 0, 1
START, END, VIDEO = 58, 57, 59
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": PAD, "eos_token_id": EOS,
    "bos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

Inputs = dict[str, Any]


def configured(name: str, **fields: Any) -> Any:
    return transformers.AutoConfig.for_model(name, **fields)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": lambda: configured("llava", vision_config=CLIP, text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE, image_seq_length=4),
    "llava_next": lambda: configured("llava_next", vision_config=CLIP, text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE, image_seq_length=4, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]]),
    "llava_onevision": lambda: configured("llava_onevision", vision_config=SIGLIP,
        text_config={**TEXT, "model_type": "qwen2"}, image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_layer=-1, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]]),
    "qwen2_5_vl": lambda: configured("qwen2_5_vl", **QWEN_IDS,
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1]},
        text_config={**TEXT, "rope_parameters": MROPE}),
    "qwen3_vl": lambda: configured("qwen3_vl", **QWEN_IDS,
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0]},
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}}),
    "paligemma": lambda: configured("paligemma", vision_config=SIGLIP, image_token_index=IMAGE, projection_dim=32,
        text_config={**TEXT, "model_type": "gemma"}),
    "paligemma2": lambda: configured("paligemma", vision_config=SIGLIP, image_token_index=IMAGE, projection_dim=32,
        text_config={**TEXT, "model_type": "gemma2", "sliding_window": 4096, "query_pre_attn_scalar": 8}),
    "smolvlm": lambda: configured("smolvlm", vision_config={**VISION, "image_size": 16, "patch_size": 4},
        text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE, scale_factor=2),
    "idefics3": lambda: configured("idefics3", vision_config={**VISION, "image_size": 16, "patch_size": 4},
        text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE, scale_factor=2),
    "internvl": lambda: configured("internvl", text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE,
        vision_config={**VISION, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        image_seq_length=4),
    "gemma3": lambda: configured("gemma3", image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
        mm_tokens_per_image=4, vision_config={**SIGLIP, "image_size": 16, "vision_use_head": False},
        text_config={**TEXT, "num_hidden_layers": 3, "sliding_window": 6, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip


@cache
def target(family: str) -> Any:
    """The family's model; its logits are far enough apart for greedy identity."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(CONFIGS[family]())
    sharpen(model, 6.0)
    if "gemma" in family:  # they scale embeddings up: at this depth a token would see little but itself
        model.get_input_embeddings().weight.data /= TEXT["hidden_size"] ** 0.5
    return model.eval()


def grids(family: str) -> tuple[int, int]:
    """Two sizes of image, in placeholders a picture: the second of another size where the family allows."""
    return {"llava_next": (4 + 4 * 4 + 4, 4 + 2 * 4 + 2)}.get(family, (4, 6 if family.startswith("qwen") else 4))


def text(count: int, seed: int) -> list[int]:
    return torch.randint(3, 57, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pictures(family: str, count: int) -> tuple[Inputs, list[int]]:
    """Pixel values of `count` images, with what the family wants beside them, and how many placeholders each fills."""
    noise = torch.Generator().manual_seed(11)
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4] if i % 2 == 0 else [1, 4, 6] for i in range(count)])
        patches = int(grid.prod(1).sum())
        values = torch.randn(patches, 3 * 2 * 4 * 4, generator=noise)
        return {"pixel_values": values, "image_grid_thw": grid}, (grid.prod(1) // 4).tolist()
    if family in ("llava_next", "llava_onevision"):
        sizes = [[16, 16] if i % 2 == 0 else [8, 16] for i in range(count)]
        tiles = [1 + h * w // 64 for h, w in sizes]
        values = torch.randn(count, max(tiles), 3, 8, 8, generator=noise)
        held = [4 + (h // 4) * (w // 4 + 1) for h, w in sizes]
        return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}, held
    size = 16 if family in ("smolvlm", "idefics3", "internvl", "gemma3") else 8
    values = torch.randn(count, 3, size, size, generator=noise)
    return {"pixel_values": values}, [4] * count


ROWS = ((5, 1, 4), (3, 2, 2), (6, 0, 3), (2, 1, 1))  # text, images, text


def prompt(family: str, rows: Sequence[tuple[int, int, int]]) -> Inputs:
    """Rows of text, images and text, padded on the left, as a processor would give them."""
    given, held = pictures(family, sum(images for _, images, _ in rows))
    left, ids, kinds = list(held), [], []
    for number, (before, images, after) in enumerate(rows):
        row = text(before, number)
        for _ in range(images):
            row += [START, *[IMAGE] * left.pop(0), END]
        ids.append(row + text(after, 20 + number))
    if family in ("smolvlm", "idefics3"):  # images of a row stand in its own part of the tensor; empty ones are dropped
        most = max(images for _, images, _ in rows)
        values, start = torch.zeros(len(rows), most, 3, 16, 16), 0
        for number, (_, images, _) in enumerate(rows):
            values[number, :images] = given["pixel_values"][start : start + images]
            start += images
        given["pixel_values"] = values
    width = max(map(len, ids))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    kinds = (tokens == IMAGE).long()
    if family.startswith("qwen"):
        given["mm_token_type_ids"] = kinds.int()
    if family == "gemma3":
        given["token_type_ids"] = kinds
    if family.startswith("paligemma"):
        given["token_type_ids"] = torch.zeros_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, **given}


def vision_tower(model: Any) -> torch.nn.Module:
    """What turns pixels into features."""
    inner = model.model
    return next(getattr(inner, n) for n in ("vision_tower", "vision_model", "visual") if hasattr(inner, n))


def placeholders(given: Inputs) -> Tensor:
    return given["input_ids"] == IMAGE
