"""Images from continuous tokens: a small causal transformer over a VAE's latents, with a diffusion head."""

from polyspec.modalities.image.continuous.model import LatentImageConfig, LatentImageModel

__all__ = ["LatentImageConfig", "LatentImageModel"]
