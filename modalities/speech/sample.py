"""The speech sample: a small Llama and its codec in `samples/llama-hibari`; it reads English sentences aloud.

Trained by `polyspec task=train modality=speech` (see `train` beside this).
"""

from pathlib import Path

from polyspec.errors import CheckpointError
from polyspec.files import shipped

NAME = "llama-hibari"


def sample_path() -> Path:
    """The folder of the shipped checkpoint, in Hugging Face format."""
    return shipped(NAME)


def existing_sample() -> Path:
    """The same; CheckpointError if it is not there."""
    folder = sample_path()
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(
            f"no speech sample in {folder}: train one with polyspec task=train modality=speech train.data.path=sentences.txt "
            f"train.export={NAME}, and name its folder as target"
        )
    return folder
