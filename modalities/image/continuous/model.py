"""A causal transformer over text and image latents whose next latent is drawn by a diffusion head.

Autoregressive Image Generation without Vector Quantization (MAR), 2406.11838, section 3: the transformer gives a
condition for each latent, and a small MLP, asked once a denoising step, its distribution. In raster order, or in any
order, as a causal model can learn it (RandAR, 2412.01827): beside each latent stands which place comes next.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel

from polyspec.denoising import Sampler
from polyspec.errors import ConfigError

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_large",
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "clip_sample_range": 5.0,
}


class LatentImageConfig(PreTrainedConfig):
    """Sizes; the scheduler of diffusers' `DDPMScheduler`, how many of its steps are taken and the last one's noise (None: the
    scheduler's); the latents' mean and deviation (of each channel), which the model's tokens are without; guidance_scale;
    order: "raster", or "random" for a model that draws its places in any order."""

    model_type = "polyspec_latent_image"

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        head_size: int = 320,
        head_layers: int = 3,
        grid: int = 8,
        patch: int = 2,
        latent_channels: int = 4,
        scheduler: dict[str, Any] | None = None,
        denoising_steps: int = 50,
        last_std: float | None = None,
        latent_mean: float | list[float] = 0.0,
        latent_std: float | list[float] = 1.0,
        guidance_scale: float = 1.0,
        order: str = "raster",
        **kwargs: Any,
    ):
        if order not in ("raster", "random"):
            raise ConfigError(f"order must be raster or random, got {order!r}")
        self.order = order
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.head_size, self.head_layers = head_size, head_layers
        self.grid, self.patch, self.latent_channels = grid, patch, latent_channels
        self.scheduler = {**SCHEDULER, **(scheduler or {})}
        self.denoising_steps, self.last_std = denoising_steps, last_std
        self.latent_mean, self.latent_std, self.guidance_scale = latent_mean, latent_std, guidance_scale
        super().__init__(**kwargs)

    @property
    def image_tokens(self) -> int:
        return self.grid**2

    @property
    def latent_dim(self) -> int:
        """Numbers in a token: a patch of latents."""
        return self.latent_channels * self.patch**2


class HeadBlock(nn.Module):
    """A residual MLP whose scale, shift and gate come from the condition (adaptive layer norm, 2212.09748)."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.modulation = nn.Linear(size, 3 * size)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normal = self.norm(x)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(normal + shift, normal, scale)))


class DiffusionHead(nn.Module):
    """What the scheduler's `prediction_type` names, for noisy latents `[.., D]` at timesteps `[..]` given `[.., C]`."""

    def __init__(self, config: LatentImageConfig):
        super().__init__()
        size = config.head_size
        self.enter = nn.Linear(config.latent_dim, size)
        self.condition = nn.Linear(config.hidden_size, size)
        self.time = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.blocks = nn.ModuleList(HeadBlock(size) for _ in range(config.head_layers))
        self.leave = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, config.latent_dim))

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return self.denoise(x, self.modulations(condition, self.times(timesteps)))

    def times(self, timesteps: Tensor) -> Tensor:
        """Embeddings `[.., size]` of timesteps `[..]`."""
        half = self.enter.out_features // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device))
        angles = timesteps[..., None].float() * rates
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.enter.weight.dtype))

    def modulations(self, condition: Tensor, times: Tensor) -> Tensor:
        """`[.., blocks, 3·size]`: half of the head's arithmetic, and known before x is."""
        mixed = nn.functional.silu(self.condition(condition) + times)
        return torch.stack([block.modulation(mixed) for block in self.blocks], dim=-2)  # type: ignore[operator]

    def denoise(self, x: Tensor, modulations: Tensor) -> Tensor:
        x = self.enter(x)
        for block, modulation in zip(self.blocks, modulations.unbind(-2), strict=True):
            x = block(x, modulation)
        return self.leave(x)


class LatentImageModel(PreTrainedModel):
    """`<s> words <boi>`, then `grid²` latents in raster order, or in any."""

    config_class = LatentImageConfig
    config: LatentImageConfig

    def __init__(self, config: LatentImageConfig):
        super().__init__(config)
        size = config.hidden_size
        self.transformer = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=size,
                intermediate_size=4 * size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=4096,
            )
        )
        self.enter = nn.Linear(config.latent_dim, size)
        self.places = nn.Embedding(config.image_tokens, size)  # which comes next
        if config.order == "random":
            self.origins = nn.Embedding(config.image_tokens, size)  # which the latent is of
        self.head = DiffusionHead(config)
        self.post_init()

    def sampler(self) -> Sampler:
        """The denoising steps; ConfigError or UnsupportedModelError if the configuration allows none."""
        config = self.config
        return Sampler.from_scheduler(DDPMScheduler(**config.scheduler), config.denoising_steps, config.last_std)

    def latent_target(self, guidance_scale: float = 1.0) -> Any:
        """What a loop needs of this model."""
        from polyspec.modalities.image.continuous.target import LatentTarget

        model: Any = self
        return LatentTarget(model, guidance_scale)

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` of the VAE -> tokens `[B, grid², D]`."""
        p, n = self.config.patch, self.config.grid
        mean, std = self.normalisation(latents)
        x = (latents - mean) / std
        x = x.unflatten(3, (n, p)).unflatten(2, (n, p))  # [B, C, n, p, n, p]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """`to_tokens` the other way round."""
        p, n, c = self.config.patch, self.config.grid, self.config.latent_channels
        x = tokens.unflatten(1, (n, n)).unflatten(3, (c, p, p)).permute(0, 3, 1, 4, 2, 5)
        mean, std = self.normalisation(tokens)
        return x.flatten(4).flatten(2, 3) * std + mean

    def normalisation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of latents, each `[C or 1, 1, 1]`."""
        mean, std = (like.new_tensor(x).view(-1, 1, 1) for x in (self.config.latent_mean, self.config.latent_std))
        return mean, std

    def marks(self, order: Tensor, slot: Tensor) -> Tensor:
        """What slots `[B, T]` (0: the last word, i: latent i - 1) carry beside their content, `[B, T, C]`, where the places
        are drawn in the order `[B, L]`: which one comes next, and which it is of where that does not follow."""
        last = order.shape[1] - 1
        marks = self.places(order.gather(1, slot.clamp(max=last)))
        if self.config.order == "random":
            marks = marks + self.origins(order.gather(1, (slot - 1).clamp(0, last))) * (slot > 0)[..., None]
        return marks

    def forward(self, prompts: Tensor, lengths: Tensor, tokens: Tensor, order: Tensor | None = None) -> Tensor:
        """Conditions `[B, L, C]` of all latents, for training: prompts `[B, P]` filled at the right, their lengths `[B]`,
        tokens `[B, L, D]` in the order `[B, L]` of their places (None: raster)."""
        count = tokens.shape[1]
        if order is None:
            order = torch.arange(count, device=tokens.device).expand(len(tokens), -1)
        place = torch.arange(prompts.shape[1] + count - 1, device=prompts.device) - (lengths[:, None] - 1)  # slot
        image = self.enter(tokens)
        image = image.gather(1, (place - 1).clamp(0, count - 1)[..., None].expand(-1, -1, image.shape[-1]))
        words = self.transformer.embed_tokens(nn.functional.pad(prompts, (0, count - 1)))
        embeds = torch.where((place > 0)[..., None], image, words)
        at = self.marks(order, place.clamp(min=0))
        hidden = self.transformer(
            inputs_embeds=embeds + at * (place >= 0)[..., None], use_cache=False
        ).last_hidden_state
        slots = lengths[:, None] - 1 + torch.arange(count, device=prompts.device)
        return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))


def in_raster(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens `[B, L, D]` that came in the order `[B, L]`, each in its place."""
    return torch.empty_like(tokens).scatter_(1, order[..., None].expand_as(tokens), tokens)


AutoConfig.register(LatentImageConfig.model_type, LatentImageConfig, exist_ok=True)
AutoModel.register(LatentImageConfig, LatentImageModel, exist_ok=True)
