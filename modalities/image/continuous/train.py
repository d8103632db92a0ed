"""Training of a continuous image model from captioned pictures: the VAE, the target, the draft model.

Each part goes on from its last checkpoint when run again. `polyspec task=train train=image_continuous`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from polyspec.modalities.image.continuous.model import LatentImageConfig, LatentImageModel
from polyspec.modalities.image.continuous.pipeline import DRAFT, OPENING, VAE
from polyspec.modalities.image.train.data import Pictures, read_pictures, to_model_range
from polyspec.modalities.image.train.language_model import known_captions, pad_prompts
from polyspec.modalities.image.train.model import new_processor
from polyspec.modalities.image.train.stage import (
    Budget,
    Checkpoints,
    batch_indices,
    learning_rate,
    run_stage,
    step_generator,
    update,
)
from polyspec.modalities.image.train.tokenizer import reconstruction_loss
from polyspec.training.trainer import fit


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """The autoencoder: `channels` a resolution, each halving the sides but the last; its training."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=20))
    channels: tuple[int, ...] = (32, 64, 96)
    latent_channels: int = 4
    batch: int = 12
    learning_rate: float = 1e-3
    kl: float = 1e-4
    l1: float = 0.2
    gradient: float = 0.2
    checkpoint_minutes: float = 3.0
    seed: int = 0

    def model(self) -> AutoencoderKL:
        """A fresh one."""
        kind: Any = AutoencoderKL  # its annotations know tuples of one alone
        return kind(
            down_block_types=("DownEncoderBlock2D",) * len(self.channels),
            up_block_types=("UpDecoderBlock2D",) * len(self.channels),
            block_out_channels=tuple(self.channels),
            latent_channels=self.latent_channels,
            layers_per_block=1,
            norm_num_groups=min(8, *self.channels),
            mid_block_add_attention=False,
            sample_size=64,
        )


@dataclass(frozen=True, slots=True)
class LatentObjective:
    """The head's squared error on noised latents, `repeats` noise levels a token in one head call; `context` is the largest
    deviation of noise added to earlier latents, so that a drawn context is not foreign; a share of captions is left out."""

    repeats: int = 4
    context: float = 0.3
    null_captions: float = 0.1

    def losses(self, model: Any) -> Callable[..., dict[str, Tensor]]:
        """`losses(model, batch)` for training.fit."""
        scheduler: Any = DDPMScheduler(**model.config.scheduler)
        kind, most = scheduler.config["prediction_type"], scheduler.config["num_train_timesteps"]

        def losses(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            x = batch["tokens"]
            level = self.context * torch.rand(len(x), 1, 1, device=x.device)
            condition = model(batch["prompts"], batch["lengths"], x + level * torch.randn_like(x))
            clean = x.unsqueeze(2).expand(-1, -1, self.repeats, -1)  # [B, L, r, D]
            noise, t = torch.randn_like(clean), torch.randint(most, clean.shape[:3], device=x.device)
            flat, flat_noise, flat_t = clean.flatten(0, 2), noise.flatten(0, 2), t.flatten()
            noisy = scheduler.add_noise(flat, flat_noise, flat_t).view_as(clean)
            wanted = {"epsilon": noise, "sample": clean}.get(kind)
            if wanted is None:
                wanted = scheduler.get_velocity(flat, flat_noise, flat_t).view_as(clean)
            out = model.head(noisy, t, condition.unsqueeze(2))
            return {"loss": (out.float() - wanted).square().mean()}

        return losses


class Captioned(Dataset[dict[str, Any]]):
    """Latents `[N, L, D]` with a caption each, or with none now and then."""

    def __init__(self, tokens: Tensor, prompts: list[list[int]], null: float):
        self.tokens, self.prompts, self.null = tokens, prompts, null

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: int) -> dict[str, Any]:
        prompt = self.prompts[item]
        bare = bool(torch.rand(()) < self.null)
        return {"tokens": self.tokens[item], "prompt": [prompt[0], prompt[-1]] if bare else prompt}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    prompts, lengths = pad_prompts([r["prompt"] for r in rows])
    return {"prompts": prompts, "lengths": lengths, "tokens": torch.stack([r["tokens"] for r in rows])}


def train(config: Mapping[str, Any]) -> Path:
    """All parts, as `conf/train/image_continuous.yaml` describes them, into the folder `output`, which is then a target."""
    parts = hydra.utils.instantiate(config, _convert_="all")
    output = Path(parts["output"])
    pictures = read_pictures(parts["data"])
    keep = (~pictures.test).nonzero().flatten()
    vae = train_vae(pictures.pixels[keep], parts["vae"], output)
    tokenizer = new_processor(known_captions(parts["data"], pictures)).tokenizer
    latents = encode(vae, pictures.pixels[keep])
    prompts = prompts_of(pictures, keep.tolist(), tokenizer)
    for name, folder in (("target", output), ("draft", output / DRAFT)):
        config_of = LatentImageConfig(
            vocab_size=len(tokenizer),
            latent_channels=latents.shape[1],
            grid=latents.shape[2] // parts["sampler"].get("patch", 2),
            latent_mean=float(latents.mean()),
            latent_std=float(latents.std()),
            **parts["sampler"],
            **parts[name],
        )
        torch.manual_seed(parts["schedule"].seed)
        model = LatentImageModel(config_of)
        objective: LatentObjective = parts["objective"]
        data = Captioned(model.to_tokens(latents), prompts, objective.null_captions)
        fit(model, objective.losses, data, collate, parts["schedule"], folder, parts.get("device") or "cpu")
        tokenizer.save_pretrained(folder)
    return output


def train_vae(pixels: Tensor, config: VAEConfig, output: Path) -> AutoencoderKL:
    """Train the autoencoder on uint8 `pixels [N, 3, 64, 64]`, or go on; saved to `output/vae`."""
    torch.manual_seed(config.seed)
    model: Any = config.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    batch = min(config.batch, len(pixels))

    def train_step(step: int, spent: float) -> dict[str, float]:
        x = to_model_range(pixels[batch_indices(step, len(pixels), batch, config.seed)])
        found = model.encode(x).latent_dist
        z = found.mean + found.std * torch.randn(found.mean.shape, generator=step_generator(step, config.seed))
        kl = found.kl().mean() / z[0].numel()
        loss = reconstruction_loss(x, model.decode(z).sample, config.l1, config.gradient) + config.kl * kl
        update(optimizer, loss, learning_rate(config.learning_rate, step, spent))
        return {"loss": loss.item(), "kl": kl.item()}

    state = {"model": model, "optimizer": optimizer}
    run_stage(
        "vae", config.budget, Checkpoints(output / "vae.pt", config.checkpoint_minutes, {}), state, train_step, dict
    )
    model.eval().save_pretrained(output / VAE)
    return model


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, batch: int = 64) -> Tensor:
    """uint8 pixels to the means of their latents `[N, C, H, W]`."""
    return torch.cat([vae.encode(to_model_range(part)).latent_dist.mean for part in pixels.split(batch)])


def prompts_of(pictures: Pictures, rows: list[int], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of the rows' captions, each with its style."""
    return [tokenizer(f"{pictures.captions[r]} {pictures.styles[r]}{OPENING}").input_ids for r in rows]
