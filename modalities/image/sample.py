"""The image sample: a 7M-parameter Janus model, shipped in `samples/janus-emoji`; it draws 64x64 emoji from a caption.

256 image tokens from a codebook of 512; trained by `polyspec task=train modality=image` (see `train` beside this).
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, JanusForConditionalGeneration, JanusProcessor

from polyspec.errors import CheckpointError
from polyspec.files import shipped

NAME = "janus-emoji"
LATENT_NAME = "latent-emoji"
"""The sample of continuous tokens: 64 of 16 numbers, drawn by a diffusion head; see its card in `samples`."""


def sample_path() -> Path:
    """The folder of the shipped checkpoint, in Hugging Face format."""
    return shipped(NAME)


def latent_sample_path() -> Path:
    """The folder of the shipped model of continuous tokens, its VAE and its draft model."""
    return shipped(LATENT_NAME)


def load_sample(
    dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu", path: str | Path | None = None
) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """The sample model in eval mode, and its processor; `path` names another folder of the same kind.

    The stored weights are bfloat16 ("auto"), so `dtype=torch.float32` computes in float32 with the same values.
    Raises CheckpointError: the folder is missing or not a Janus checkpoint.
    """
    folder = sample_path() if path is None else Path(path)
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(f"no image sample in {folder}: reinstall polyspec, or name a Janus checkpoint's folder")
    try:
        model: Any = JanusForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the Janus checkpoint in {folder} cannot be read: {error}") from error
    return model.to(device).eval(), processor
