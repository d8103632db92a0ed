"""Text to pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from polyspec import pipelines
from polyspec.api import decode, make_draws
from polyspec.decoding.continuous import Continuous
from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Processing
from polyspec.errors import ConfigError, InputError
from polyspec.modalities.image.sample import NAME, latent_sample_path, sample_path
from polyspec.modalities.image.target import adapter, make_image_target, model_class
from polyspec.outputs import Result
from polyspec.recipe import find_recipe

DEFAULT_RECIPE, DRAFTED = "gumbel_jacobi", "gumbel_coupled"  # the latter where a drafter is given or shipped
LATENT = "polyspec_latent_image"  # the model_type of models with a diffusion head


class Pipeline:
    """Draws pictures with an autoregressive image model. See `polyspec.pipeline` for the arguments.

    target: a folder or hub id, or a (model, processor) pair. A model of continuous tokens gets a pipeline of its own kind,
    and is the default of the recipes that are for such.
    """

    def __new__(cls, *, target: Any = None, recipe: str | None = None, **kwargs: Any) -> Any:
        if target is None and recipe is not None and for_continuous_tokens(recipe):
            target = latent_sample_path()
        if has_continuous_tokens(target):
            from polyspec.modalities.image.continuous.pipeline import ContinuousPipeline

            return ContinuousPipeline(target=target, recipe=recipe, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        *,
        target: Any = None,
        recipe: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        sample = NAME if pipelines.is_from(target, sample_path()) else None
        drafter = (overrides or {}).get("draft_model") or pipelines.shipped_drafter(sample, find_recipe(DRAFTED), "draft_model")
        self.method = pipelines.choose("image", recipe, DRAFTED if drafter else DEFAULT_RECIPE, overrides, sample)
        # guided pictures vary more, of a draft fewer tokens are kept, and windows, which outlive a rejection, are faster
        free = recipe is None and not overrides
        self.guided = pipelines.choose("image", None, DEFAULT_RECIPE, None, sample) if free else self.method
        if isinstance(self.method.loop, Continuous):
            raise ConfigError(
                f"recipe {self.method.recipe.name!r} is for continuous tokens, and this target's are discrete; give target=, a "
                "model that `task=train train=image_continuous` made, or choose another recipe"
            )
        if isinstance(target, tuple):
            self.model, self.processor = target
        else:
            source = sample_path() if target is None else target
            device = device or pipelines.default_device()
            self.model = load_model(source, pipelines.as_dtype(dtype, device)).to(device).eval()
            self.processor = pipelines.load(AutoProcessor.from_pretrained, source)
        make_image_target(self.model, 1.0)  # a model that cannot draw is refused before any prompt

    @property
    def loaded(self) -> tuple[Any, Any]:
        """What another pipeline takes as `target`, to share it."""
        return self.model, self.processor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        images_per_prompt: int = 1,
        size: Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Result:
        """Draw `images_per_prompt` pictures of each prompt; `outputs` holds PIL images, prompt by prompt.

        size: height and width in pixels, where the model leaves a choice. Sampling knobs left out are the checkpoint's
        (`generation_config.json`), or else its kind's. guidance_scale 1 means no guidance.
        progress: called with the number of new token positions.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise InputError("the prompt is empty; say what to draw")
        if images_per_prompt < 1:
            raise ConfigError(f"images_per_prompt must be ≥ 1, got {images_per_prompt}")
        knobs = self.settings(
            do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale
        )
        target = make_image_target(self.model, knobs.pop("guidance_scale"))
        ids, mask = target.encode(self.processor, [p for p in prompts for _ in range(images_per_prompt)], pair(size))
        context = target.config.max_position_embeddings
        if ids.shape[1] + target.image_tokens > context:
            raise InputError(
                f"a prompt of {ids.shape[1]} tokens and {target.image_tokens} image tokens exceed the model's context "
                f"of {context}; shorten the prompt{' or draw a smaller picture' if target.any_size else ''}"
            )
        emit = None if progress is None else lambda _: progress(1)
        sequences = Sequences(ids, target.image_tokens, mask=mask, emit=emit)
        sampling = knobs.pop("do_sample")
        processing = Processing(pipelines.processors(**knobs) if sampling else [], target.constraint)
        method = self.method if target.guidance is None else self.guided
        draws = make_draws(method, sampling, seed, len(ids), ids.device)
        stats = decode(method, target, sequences, processing, draws, {})
        tokens = sequences.result()[:, -target.image_tokens :]
        return Result(target.pictures(self.processor, tokens), stats)

    def settings(self, **given: Any) -> dict[str, Any]:
        """Sampling knobs: what the caller gave, else what the checkpoint's generation config says, else its kind's."""
        config = self.model.generation_config
        chosen = dict(adapter(self.model.config.model_type, type(self.model).__name__).defaults)
        for name in ("do_sample", "temperature", "top_k", "top_p", "guidance_scale"):
            value = getattr(config, name, None) if given.get(name) is None else given[name]
            if value is not None or name not in chosen:
                chosen[name] = value
        chosen["guidance_scale"] = float(chosen["guidance_scale"] or 1.0)
        if chosen["guidance_scale"] < 1:
            raise ConfigError(f"guidance_scale must be ≥ 1, got {chosen['guidance_scale']}")
        if chosen["guidance_scale"] < 1.001:  # a checkpoint may carry a number that is 1 but for transformers' check
            chosen["guidance_scale"] = 1.0
        chosen["do_sample"] = bool(chosen["do_sample"])
        return chosen


def for_continuous_tokens(recipe: str) -> bool:
    """Whether a recipe's loop is that of continuous tokens; ConfigError if there is none of the name."""
    return str(find_recipe(recipe).config.loop._target_).endswith(f".{Continuous.__name__}")


def has_continuous_tokens(target: Any) -> bool:
    """Whether `target`, a pipeline's argument, is a model with a diffusion head, or the folder of one."""
    if isinstance(target, tuple):
        return bool(target) and hasattr(target[0], "latent_target")
    config = Path(target) / "config.json" if isinstance(target, str | Path) else None
    if config is None or not config.is_file():
        return False
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == LATENT
    except (OSError, ValueError, AttributeError):  # reported where the checkpoint is loaded
        return False


def load_model(source: Any, dtype: torch.dtype) -> Any:
    """An image model from a folder or the hub; CheckpointError if it is none."""
    kind = pipelines.load(AutoConfig.from_pretrained, source).model_type
    return pipelines.load(model_class(adapter(kind, source)).from_pretrained, source, dtype=dtype)


def pair(size: Sequence[int] | None) -> tuple[int, int] | None:
    """(height, width) as given; ConfigError for what are not two whole numbers."""
    if size is None:
        return None
    whole = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    if not whole:
        raise ConfigError(f"size must be height and width in pixels, e.g. size=[512,512]; got {size!r}")
    return size[0], size[1]
