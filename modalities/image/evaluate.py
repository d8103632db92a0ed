"""Measures of the image sample: reconstruction quality of its tokenizer, and contact sheets to look at."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from polyspec.bench.calls import time_calls
from polyspec.modalities.image.sample import latent_sample_path
from polyspec.modalities.image.target import make_image_target
from polyspec.prompts import load_prompts


def psnr(reference: Tensor, image: Tensor) -> float:
    """Mean peak signal-to-noise ratio over a batch, in dB; both [B,3,H,W] in [-1, 1], and `image` is clamped to it."""
    error = (image.float().clamp(-1, 1) - reference.float()).square().mean(dim=(1, 2, 3)) / 4.0
    return (-10.0 * error.clamp(min=1e-10).log10()).mean().item()


def share_right(pixels: Tensor, references: Tensor) -> float:
    """Share of pictures [N,3,H,W] whose nearest reference [N,3,H,W], by squared error, is the one of the same row.

    References are the training pictures of the prompts, so this says how often a memorised picture comes out.
    """
    distances = torch.cdist(pixels.float().flatten(1), references.float().flatten(1))
    return (distances.argmin(1) == torch.arange(len(pixels))).float().mean().item()


def draw_plainly(model: Any, processor: Any, prompts: Sequence[str], seed: int = 0, **knobs: Any) -> list[Image.Image]:
    """Draw one picture a prompt with a Janus model's own `generate` and its own defaults; `knobs` are passed to it."""
    inputs = processor(text=list(prompts), generation_mode="image", return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    tokens = model.generate(**inputs.to(model.device), generation_mode="image", **knobs)
    # decode_image_tokens gives [B,H,W,C], but the PIL-based image processor takes only channels first
    pixels = model.decode_image_tokens(tokens).permute(0, 3, 1, 2).float().cpu()
    return processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]


def bench_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts of a file in samples/prompts by its name, or the given list."""
    return load_prompts(prompts) if isinstance(prompts, str) else list(prompts)


def transformers_generate(pipe: Any, prompts: Sequence[str], **arguments: Any) -> int:
    """Draw with the model's own `generate`; the number of image tokens."""
    knobs = pipe.settings(**arguments)
    target = make_image_target(pipe.model, knobs.pop("guidance_scale"))
    tokens = target.generate(pipe.processor, prompts, arguments.get("size"), **knobs)
    target.pictures(pipe.processor, tokens)
    return tokens.numel()


def continuous_sample() -> Path:
    """What the bench of continuous tokens measures if no target is named."""
    return latent_sample_path()


def call_seconds(pipe: Any, prompts: Sequence[str], sizes: Sequence[int], **arguments: Any) -> dict[int, float]:
    """Median seconds of a target call of N tokens a row, N in `sizes`, half-way through a picture; the sizes in turn."""
    target = make_image_target(pipe.model, pipe.settings(**arguments)["guidance_scale"])
    ids, mask = target.encode(pipe.processor, prompts, arguments.get("size"))
    target.prefill(ids, mask, capacity=ids.shape[1] + target.image_tokens + max(sizes))
    half = ids.new_zeros((len(ids), target.image_tokens // 2))
    target.forward(torch.cat([ids[:, -1:], half], dim=1))
    target.rollback([n + half.shape[1] for n in target.cache_lengths[: len(ids)]])
    return time_calls(target, half[:, :1], sizes)


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str], columns: int = 8, scale: int = 2, gap: int = 8
) -> Image.Image:
    """One picture with all `images` (of one size) in rows of `columns`, enlarged `scale` times, each over its label."""
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    width, height = (side * scale for side in images[0].size)
    cell_width, cell_height = width + gap, height + gap + 14
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = gap + k % columns * cell_width, gap + k // columns * cell_height
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height), label[: width // 6], fill="black")
    return sheet
