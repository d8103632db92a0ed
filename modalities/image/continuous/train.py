"""Training of a continuous image model from captioned pictures: the VAE, the target, the draft model.

Each part goes on from its last checkpoint when run again. `polyspec task=train train=image_continuous`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor
from torch.utils.data import Dataset

from polyspec.modalities.image.continuous.model import LatentImageConfig, LatentImageModel
from polyspec.modalities.image.continuous.pipeline import DRAFT, VAE
from polyspec.modalities.image.evaluate import psnr
from polyspec.modalities.image.train.data import read_pictures, to_model_range
from polyspec.modalities.image.train.language_model import DRAWN, Captions, known_captions, lm_rows, pad_prompts
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

WEIGHTS = torch.bfloat16  # of what is saved


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """The autoencoder: `channels` a resolution, each halving the sides but the last; its training."""

    budget: Budget = field(default_factory=lambda: Budget(minutes=15))
    channels: tuple[int, ...] = (16, 48, 96)
    latent_channels: int = 4
    batch: int = 12
    learning_rate: float = 1e-3
    kl: float = 5e-3
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
class Drawn:
    """What is drawn: all parts learn pictures of these styles, the two models those of these names (None: all)."""

    styles: tuple[str, ...] = ("twemoji",)
    names: tuple[str, ...] | None = DRAWN


@dataclass(frozen=True, slots=True)
class LatentObjective:
    """What both models learn at noised latents, `repeats` noise levels a token in one head call; `context` is the largest
    deviation of noise added to earlier latents, so that a drawn context is not foreign; a share of captions is left out."""

    repeats: int = 4
    context: float = 0.3
    null_captions: float = 0.1

    def losses(self, model: Any) -> Callable[..., dict[str, Tensor]]:
        """`losses(model, batch)` for training.fit: the squared error of the head, at any noise level."""
        scheduler: Any = DDPMScheduler(**model.config.scheduler)
        kind, most = scheduler.config["prediction_type"], scheduler.config["num_train_timesteps"]

        def losses(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            clean, noise = self.repeated(batch["tokens"])
            t = torch.randint(most, clean.shape[:3], device=clean.device)
            parts = (clean.flatten(0, 2), noise.flatten(0, 2), t.flatten())
            wanted = {"epsilon": noise, "sample": clean}.get(kind)
            if wanted is None:
                wanted = scheduler.get_velocity(*parts).view_as(clean)
            condition = model(batch["prompts"], batch["lengths"], self.context_of(batch["tokens"]), batch["order"])
            out = model.head(scheduler.add_noise(*parts).view_as(clean), t, condition.unsqueeze(2))
            return {"loss": (out.float() - wanted).square().mean()}

        return losses

    def draft_losses(self, model: Any, target: Any) -> Callable[..., dict[str, Tensor]]:
        """The same for a draft model: the divergence KL = |Δ|²/2 of its denoising steps from the target's, Δ the distance
        of the means in deviations, which is all that acceptance depends on."""
        sampler, scheduler = target.sampler().to(target.device), DDPMScheduler(**target.config.scheduler)
        scale = sampler.mean_clean * sampler.clean_out / torch.where(sampler.std > 0, sampler.std, 1)

        def losses(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            clean, noise = self.repeated(batch["tokens"])
            step = torch.randint(len(sampler), clean.shape[:3], device=clean.device)
            t = sampler.timesteps[step]
            parts: Any = (clean.flatten(0, 2), noise.flatten(0, 2), t.flatten())
            noisy, context = scheduler.add_noise(*parts).view_as(clean), self.context_of(batch["tokens"])
            with torch.no_grad():
                known = target(batch["prompts"], batch["lengths"], context, batch["order"])
                wanted = target.head(noisy, t, known.unsqueeze(2)).float()
            condition = model(batch["prompts"], batch["lengths"], context, batch["order"])
            gap = scale[step, None] * (model.head(noisy, t, condition.unsqueeze(2)).float() - wanted)
            return {"loss": gap.square().sum(-1).mean() / 2}

        return losses

    def repeated(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B, L, D]` as `[B, L, repeats, D]`, and noise for each."""
        clean = tokens.unsqueeze(2).expand(-1, -1, self.repeats, -1)
        return clean, torch.randn_like(clean)

    def context_of(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, L, D]` with noise of a level drawn row by row."""
        return tokens + self.context * torch.rand(len(tokens), 1, 1, device=tokens.device) * torch.randn_like(tokens)


class Captioned(Dataset[dict[str, Any]]):
    """Tokens drawn from the autoencoder's `means` and `stds [N, L, D]`, with one of the picture's captions, or with none now
    and then. They are drawn because a head cannot be sharper than the decoder needs: a draft's is then near enough. They come
    in raster order, or where `shuffled` in a new one each time."""

    def __init__(
        self, means: Tensor, stds: Tensor, captions: Captions, rows: list[int], null: float, shuffled: bool = False
    ):
        self.means, self.stds, self.captions, self.rows, self.null = means, stds, captions, rows, null
        self.shuffled = shuffled

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        variants = self.captions.ids[self.rows[item]]
        prompt = list(variants[int(torch.randint(len(variants), ()))])
        bare = bool(torch.rand(()) < self.null)
        tokens = self.means[item] + self.stds[item] * torch.randn(self.means[item].shape)
        order = torch.randperm(len(tokens)) if self.shuffled else torch.arange(len(tokens))
        return {"tokens": tokens[order], "order": order, "prompt": [prompt[0], prompt[-1]] if bare else prompt}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    prompts, lengths = pad_prompts([r["prompt"] for r in rows])
    return {"prompts": prompts, "lengths": lengths, **{k: torch.stack([r[k] for r in rows]) for k in ("tokens", "order")}}


def train(config: Mapping[str, Any]) -> Path:
    """All parts, as `conf/train/image_continuous.yaml` describes them, into the folder `output`, which is then a target."""
    parts = hydra.utils.instantiate(config, _convert_="all")
    output, device = Path(parts["output"]), parts.get("device") or "cpu"
    pictures = read_pictures(parts["data"])
    drawn: Drawn = parts["drawn"]
    every, _ = lm_rows(pictures, drawn.styles, None)
    vae = train_vae(pictures.pixels[every], parts["vae"], output)
    tokenizer: Any = new_processor(known_captions(parts["data"], pictures)).tokenizer
    rows, _ = lm_rows(pictures, drawn.styles, drawn.names)
    means, stds = encode(vae, pictures.pixels[rows])
    captions = Captions.of(pictures, tokenizer, parts["data"].aliases)
    objective: LatentObjective = parts["objective"]

    def trained(name: str, folder: Path, begin: Callable[..., Any]) -> LatentImageModel:
        model = new_model(means, stds, {"vocab_size": len(tokenizer), **parts["sampler"], **parts[name]})
        tokens = model.to_tokens(means)
        spread = model.to_tokens(means + stds) - tokens
        shuffled = model.config.order == "random"
        data = Captioned(tokens, spread, captions, rows.tolist(), objective.null_captions, shuffled)
        fit(model, begin, data, collate, parts["schedules"][name], folder, device, WEIGHTS)
        tokenizer.save_pretrained(folder)
        return model

    target = trained("target", output, objective.losses)
    trained("draft", output / DRAFT, partial(objective.draft_losses, target=target))
    return output


def new_model(means: Tensor, stds: Tensor, settings: Mapping[str, Any]) -> LatentImageModel:
    """One for latents `[N, C, H, W]` of these means and deviations; `settings` as of LatentImageConfig."""
    torch.manual_seed(0)
    return LatentImageModel(
        LatentImageConfig(
            latent_channels=means.shape[1],
            grid=means.shape[2] // settings.get("patch", 2),
            latent_mean=means.mean((0, 2, 3)).tolist(),
            latent_std=(means.var((0, 2, 3)) + stds.square().mean((0, 2, 3))).sqrt().tolist(),
            **settings,
        )
    )


def train_vae(pixels: Tensor, config: VAEConfig, output: Path) -> AutoencoderKL:
    """Train the autoencoder on uint8 `pixels [N, 3, 64, 64]`, or go on; saved to `output/vae`."""
    torch.manual_seed(config.seed)
    model: Any = config.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    batch = min(config.batch, len(pixels))

    def train_step(step: int, spent: float) -> dict[str, float]:
        x = to_model_range(pixels[batch_indices(step, len(pixels), batch, config.seed)])
        with torch.autocast(x.device.type, torch.bfloat16):
            found = model.encode(x).latent_dist
            noise = torch.randn(found.mean.shape, generator=step_generator(step, config.seed))
            y = model.decode(found.mean + found.std * noise).sample.float()
        kl = found.kl().float().mean() / noise[0].numel()
        loss = reconstruction_loss(x, y, config.l1, config.gradient) + config.kl * kl
        update(optimizer, loss, learning_rate(config.learning_rate, step, spent))
        return {"loss": loss.item(), "kl": kl.item(), "std": found.std.mean().item(), "psnr": psnr(x, y.detach())}

    state = {"model": model, "optimizer": optimizer}
    run_stage(
        "vae", config.budget, Checkpoints(output / "vae.pt", config.checkpoint_minutes, {}), state, train_step, dict
    )
    model.bfloat16().eval().save_pretrained(output / VAE)
    return AutoencoderKL.from_pretrained(output / VAE).eval()  # latents as the saved weights make them


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """uint8 pixels to means and deviations of their latents, each `[N, C, H, W]`."""
    found = [vae.encode(to_model_range(part)).latent_dist for part in pixels.split(batch)]
    return torch.cat([f.mean for f in found]), torch.cat([f.std for f in found])
