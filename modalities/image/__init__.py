"""Images from discrete tokens; `accelerate` is for diffusers pipelines that have a transformers model draw them."""

from polyspec.modalities.image.diffusers_pipelines import accelerate

__all__ = ["accelerate"]
