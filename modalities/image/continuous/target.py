"""A LatentImageModel as the loop's target: one cache with ragged rows, guidance pairs, one head call over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyspec.errors import ConfigError
from polyspec.latent_streams import LatentStreams
from polyspec.modalities.image.continuous.model import LatentImageModel


class LatentTarget(LatentStreams):
    """A ContinuousTarget. Prompts are `<s> words <boi>`, for a model of any order each with its places `[L]` in the order to
    draw them; the stream that guidance leads away from lacks the words."""

    order: Tensor

    def __init__(self, model: LatentImageModel, guidance_scale: float = 1.0):
        super().__init__(model.device, model.dtype, sum(p.numel() for p in model.parameters()), guidance_scale)
        self.model, self.backbone, self.head = model, model.transformer, model.head
        self.dim, self.sampler = model.config.latent_dim, model.sampler().to(self.device)
        with torch.no_grad():
            self.times = model.head.times(self.sampler.timesteps)  # [T, size]

    def prefill(self, prompt: Sequence[Any], capacity: int) -> None:
        ordered = [isinstance(p, tuple) for p in prompt]
        wanted = self.model.config.order == "random"
        if ordered != [wanted] * len(prompt):
            raise ConfigError(
                f"target and draft model must draw in the same order, and this model's is {self.model.config.order}; "
                "train both with one train.sampler.order"
            )
        raster = torch.arange(self.model.config.image_tokens)
        self.order = torch.stack([p[1] if wanted else raster for p in prompt]).to(self.device)
        super().prefill([p[0] for p in prompt] if wanted else prompt, capacity)

    def bare(self, prompt: list[int]) -> list[int]:
        return [prompt[0], prompt[-1]]

    def embed_words(self, ids: Tensor) -> Tensor:
        words = self.backbone.embed_tokens(ids)
        if ids.dim() > 1:
            return words
        first = self.model.marks(self.order, torch.zeros_like(self.order[:, :1]))[:, 0]  # the last one has slot 0
        return words + first.repeat(len(ids) // len(first), 1)

    def embed_latents(self, latents: Tensor, slot: Tensor) -> Tensor:
        return self.model.enter(latents) + self.model.marks(self.order, slot)

    def conditions(self, hidden: Tensor) -> Tensor:
        """`[B, W, T, G, blocks, 3·size]` of hidden states `[B, W, G, C]`, for all T denoising steps."""
        return self.model.head.modulations(hidden.unsqueeze(2), self.times[:, None])

    def predict(self, condition: Tensor, x: Tensor, step: Tensor) -> Tensor:
        lead = condition.shape[:-4]
        row = torch.arange(lead.numel(), device=step.device).view(lead).expand(step.shape)
        modulations = condition.flatten(0, len(lead) - 1)[row, step]  # [.., G, blocks, 3·size]
        return self.model.head.denoise(x[..., None, :], modulations)
