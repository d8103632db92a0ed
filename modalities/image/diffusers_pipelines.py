"""Diffusers pipelines that have a transformers model draw tokens first: GLM-Image's, whose prior tokens are most of its
time.

Such a pipeline calls its model's plain `generate`; `accelerate` puts a recipe into that call and leaves the rest as it
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from polyspec.api import CustomGenerate
from polyspec.errors import UnsupportedModelError
from polyspec.metrics import DecodingStats
from polyspec.modalities.image.target import TARGETS
from polyspec.pipelines import choose

DEFAULT_RECIPE = "scd_gs"


class Accelerated:
    """A model whose `generate` decodes with a recipe, until `restore()` or the end of a `with` block."""

    def __init__(self, model: Any, generate: CustomGenerate):
        self.model, self.generate = model, generate
        # the class's own, so that a model accelerated before gets the new recipe
        self.installed = partial(type(model).generate, model, custom_generate=generate)
        model.generate = self.installed

    @property
    def stats(self) -> DecodingStats:
        """Of the last call."""
        return self.generate.stats

    def restore(self) -> None:
        """Give the model its own `generate` back, unless another recipe has been put in since."""
        if self.model.__dict__.get("generate") is self.installed:
            del self.model.generate

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()


def accelerate(
    pipeline: Any, recipe: str = DEFAULT_RECIPE, *, seed: int | Sequence[int] | None = None, **overrides: Any
) -> Accelerated:
    """Have a diffusers pipeline draw its tokens with `recipe`; its calls stay as they are.

        pipe = GlmImagePipeline.from_pretrained("zai-org/GLM-Image", torch_dtype=torch.bfloat16).to("cuda")
        fast = accelerate(pipe)
        image = pipe("a fox in the snow", height=1024, width=1024).images[0]
        fast.stats

    recipe, overrides: as for `polyspec.custom_generate`. seed: None follows the pipeline's own `generator`. Raises
    ConfigError for an unknown recipe or knob, UnsupportedModelError for a pipeline without a model that draws tokens.
    """
    parts = getattr(pipeline, "components", {})
    drawing = [
        part for part in parts.values() if isinstance(part, PreTrainedModel) and part.config.model_type in TARGETS
    ]
    if not drawing:
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has no model that draws tokens with generate (known: {', '.join(TARGETS)}); "
            "load a GlmImagePipeline, or use polyspec.pipeline('image', target=…)"
        )
    return Accelerated(drawing[0], CustomGenerate(choose("image", recipe, DEFAULT_RECIPE, overrides), seed=seed))
