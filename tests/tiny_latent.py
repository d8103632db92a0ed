"""A small random continuous image model, its tokenizer and autoencoder, as a pipeline takes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from polyspec.modalities.image.continuous import LatentImageConfig, LatentImageModel
from polyspec.modalities.image.continuous.train import VAEConfig
from polyspec.modalities.image.train.model import new_processor

STEPS = 6


@cache
def tokenizer() -> Any:
    return new_processor(["red heart", "blue star"]).tokenizer


@cache
def vae() -> Any:
    torch.manual_seed(1)
    return VAEConfig(channels=(8, 16), latent_channels=4).model().eval()


def model(layers: int = 2, seed: int = 0, **config: Any) -> LatentImageModel:
    """A model of 16 tokens, 2x2 patches of an 8x8 latent."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_size": 32, "head_layers": 1, "grid": 4}
    settings = {
        **sizes,
        "denoising_steps": STEPS,
        "num_hidden_layers": layers,
        "vocab_size": len(tokenizer()),
        **config,
    }
    made = LatentImageModel(LatentImageConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in made.parameters():  # transformers starts so small that conditions would not tell
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return made


def target(**config: Any) -> tuple[Any, ...]:
    """(model, tokenizer, vae, draft model)."""
    draft = {k: v for k, v in config.items() if k in ("denoising_steps", "scheduler", "last_std", "order")}
    return model(**config), tokenizer(), vae(), model(layers=1, seed=2, **draft)
