"""Training the image sample: a small `transformers` Janus model that draws 64x64 emoji from a short caption.

Three stages, each resumable from the checkpoint it writes every few minutes:

1. `train_vq`       the image tokenizer, a `JanusVQVAE`: 64x64 pixels <-> 16x16 tokens from a codebook of 512;
2. `train_lm`       the language model over caption and image tokens, in exactly the format that
                    `JanusForConditionalGeneration.generate(generation_mode="image")` presents when sampling;
3. `train_decoder`  the tokenizer's decoder alone, on the pictures that are drawn.

`train` runs all and exports the sample; `polyspec task=train modality=image` calls it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra

from polyspec.modalities.image.train.data import DataConfig
from polyspec.modalities.image.train.decoder import DecoderConfig, train_decoder
from polyspec.modalities.image.train.export import export_sample
from polyspec.modalities.image.train.language_model import LMConfig, train_lm
from polyspec.modalities.image.train.stage import Budget
from polyspec.modalities.image.train.tokenizer import VQConfig, train_vq

__all__ = [
    "Budget",
    "DataConfig",
    "DecoderConfig",
    "LMConfig",
    "VQConfig",
    "export_sample",
    "train",
    "train_decoder",
    "train_lm",
    "train_vq",
]


def train(config: Mapping[str, Any]) -> dict[str, float]:
    """All stages and the export, as `conf/train/image.yaml` describes them; run again, it continues where it stopped.

    `config` holds `data`, `vq`, `lm` and `decoder` (Hydra nodes of the `Config` classes), `output`, a folder for
    checkpoints, and `export`, the folder for the finished sample. Returns the figures of the model card.
    """
    parts = hydra.utils.instantiate(config, _convert_="all")
    output = Path(parts["output"])
    train_vq(parts["data"], parts["vq"], output)
    train_lm(parts["data"], parts["lm"], output)
    train_decoder(parts["data"], parts["decoder"], parts["lm"], output)
    return export_sample(parts["data"], parts["lm"], output, Path(parts["export"]))
