"""Text to pictures through continuous tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from polyspec import pipelines
from polyspec.decoding.continuous import Continuous
from polyspec.distributions import row_seeds
from polyspec.errors import ConfigError, InputError
from polyspec.latent_streams import draw_latents
from polyspec.metrics import LatentStats
from polyspec.modalities.image.continuous.model import LatentImageModel, in_raster
from polyspec.outputs import Result
from polyspec.recipe import find_recipe
from polyspec.verification import reflection_chain

PLAIN, DEFAULT_RECIPE = "autoregressive", "reflection"
DRAFT, VAE = "draft", "vae"  # folders inside the target's
OPENING = "<boi>"  # what stands between words and picture


class ContinuousPipeline:
    """Draws pictures with a `LatentImageModel`. See `polyspec.pipeline` for the arguments.

    target: a folder with the model, its tokenizer, `vae/` (a diffusers AutoencoderKL) and perhaps `draft/`, a smaller
    model; or (model, tokenizer, vae) or (model, tokenizer, vae, draft model).
    """

    def __init__(
        self,
        *,
        target: Any,
        recipe: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        given = dict(overrides or {})
        folder = Path() if isinstance(target, tuple) else Path(target)
        draft: Any = target[3] if isinstance(target, tuple) and len(target) > 3 else None
        if not isinstance(target, tuple):
            draft = str(folder / DRAFT) if (folder / DRAFT / "config.json").is_file() else None
        wanted = find_recipe(recipe or DEFAULT_RECIPE)
        if draft is not None and "draft_model" in (*wanted.needs, *wanted.takes):
            given = {"draft_model": draft, **given}
        self.draft = draft
        if wanted.name != PLAIN and not str(wanted.config.loop._target_).endswith(".Continuous"):
            raise ConfigError(
                f"recipe {wanted.name!r} is for discrete tokens, and this model's are continuous; choose "
                f"{DEFAULT_RECIPE}, cspd or {PLAIN}"
            )
        self.method = pipelines.choose("image", recipe, DEFAULT_RECIPE, given)
        # the plain recipe names the loop of discrete tokens; continuous ones are drawn plainly by their own
        self.loop: Continuous = Continuous(reflection_chain) if wanted.name == PLAIN else self.method.loop
        if isinstance(target, tuple):
            if len(target) not in (3, 4):
                raise ConfigError(
                    "target must be a folder, or (model, tokenizer, vae), perhaps with a draft model behind them"
                )
            parts: Any = target
            self.model, self.tokenizer, self.vae = parts[:3]
        else:
            device = device or pipelines.default_device()
            kind = pipelines.as_dtype(dtype, device)  # of the networks; denoising steps are taken in float32
            self.model = pipelines.load(LatentImageModel.from_pretrained, folder, dtype=kind).to(device).eval()
            self.tokenizer = pipelines.load(AutoTokenizer.from_pretrained, folder)
            self.vae = pipelines.load(AutoencoderKL.from_pretrained, folder / VAE).to(device).eval()
        self.loop.check(self.model.latent_target(1.0), self.method.drafter())

    @property
    def loaded(self) -> tuple[Any, ...]:
        """What another pipeline takes as `target`, to share it."""
        found = (self.model, self.tokenizer, self.vae)
        return found if self.draft is None else (*found, self.draft)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Result:
        """Draw `images_per_prompt` pictures of each prompt; `outputs` holds PIL images, prompt by prompt."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise InputError("the prompt is empty; say what to draw")
        if images_per_prompt < 1:
            raise ConfigError(f"images_per_prompt must be ≥ 1, got {images_per_prompt}")
        scale = float(self.model.config.guidance_scale if guidance_scale is None else guidance_scale)
        if scale < 1:
            raise ConfigError(f"guidance_scale must be ≥ 1, got {scale}")
        ids = [self.tokenizer(p + OPENING).input_ids for p in prompts for _ in range(images_per_prompt)]
        tokens, stats = self.draw(ids, seed, scale, progress)
        pixels = self.vae.decode(self.model.to_latents(tokens).to(self.vae.dtype)).sample
        return Result(pictures(pixels), stats)

    def draw(
        self,
        prompts: list[list[int]],
        seed: int | Sequence[int] | None,
        scale: float,
        progress: Callable[[int], None] | None,
    ) -> tuple[Tensor, LatentStats]:
        """Tokens `[B, grid², D]`."""
        target, count = self.model.latent_target(scale), self.model.config.image_tokens
        seeds = row_seeds(seed, len(prompts), torch.device("cpu")).tolist()
        given: list[Any] = prompts
        shuffled = self.model.config.order == "random"
        if shuffled:
            orders = [torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in seeds]
            given = list(zip(prompts, orders, strict=True))
        tokens, stats = draw_latents(
            self.method, self.loop, target, given, count, seed=seeds, guidance=scale, progress=progress
        )
        return (in_raster(tokens, target.order) if shuffled else tokens), stats


def pictures(pixels: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in about [-1, 1] as PIL images."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in levels]
