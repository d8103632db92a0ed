"""`polyspec task=train modality=vision_language`: a vision tower and a projector for SmolLM2-135M-Instruct.

Two stages, each continued where it stopped: `words`, in which the tower learns which words go with a picture, and
`captions`, in which it learns, through the frozen language model, to have that say them. The folder that is left serves as
`target=…`, beside the share of held-out pictures it names, with the image and without.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from polyspec import pipelines
from polyspec.errors import ConfigError
from polyspec.modalities.text.sample import fetch_sample
from polyspec.modalities.vision_language.evaluate import Example, keyword_match
from polyspec.modalities.vision_language.pipeline import Pipeline
from polyspec.modalities.vision_language.sample import PLACEHOLDER, Eyes, EyesConfig, assemble, make_processor
from polyspec.modalities.vision_language.train import captions, words
from polyspec.modalities.vision_language.train.data import pixels_of, read_examples
from polyspec.training import make_folder
from polyspec.training.trainer import Schedule, fit


@dataclass(frozen=True, slots=True)
class EyesSize:
    """The tower's shape, LeViT's (2104.01136): four convolutions that halve the picture of `image_size` pixels, then
    `layers` layers of attention over what is left, a token for each 16 × 16 pixels."""

    image_size: int = 64
    width: int = 256
    layers: int = 6
    heads: int = 8

    def __post_init__(self) -> None:
        if self.image_size % 16 or self.width % (8 * self.heads):
            raise ConfigError("size.image_size must be a multiple of 16, and size.width of 8 × size.heads")

    def config(self, text: Any, placeholder: int) -> EyesConfig:
        vision = {
            "model_type": "levit",
            "image_size": self.image_size,
            "patch_size": 16,
            "hidden_size": self.width,
            "hidden_sizes": [self.width] * 2,  # of one stage; LevitConfig wants a second, for its subsampling
            "depths": [self.layers],
            "num_attention_heads": [self.heads],
            "key_dim": [self.width // self.heads],
            "attention_ratio": [1],
            "mlp_ratio": [2],
            "down_ops": [],
        }
        return EyesConfig(
            vision_config=vision,
            text_config={k: v for k, v in text.to_dict().items() if k != "_name_or_path"},  # a path of this machine
            image_token_index=placeholder,
            image_seq_length=(self.image_size // 16) ** 2,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )


def train(config: Any) -> dict[str, Any]:
    """Train, or continue, what the `train` group describes, and measure it on the test split; the report is also left in
    `output`/report.json."""
    from hydra.utils import instantiate

    output = Path(str(config.output))
    make_folder(output)
    device = config.device or pipelines.default_device()
    paths = [str(p) for p in config.data.paths]
    folder = Path(str(config.language)) if config.language else fetch_sample()
    low = pipelines.as_dtype(config.dtype, device)
    language: Any = pipelines.load(AutoModelForCausalLM.from_pretrained, folder, dtype=low).to(device).eval()
    language.requires_grad_(False)
    examples, held_out = read_examples(paths, "train"), read_examples(paths, "test", alike=3)
    stages = instantiate(config.words), instantiate(config.schedule)
    eyes, report = train_eyes(
        language, folder, instantiate(config.size), stages, examples, held_out, output, device, low
    )
    eyes.save_pretrained(output)
    if config.measure:
        random.Random(0).shuffle(held_out)
        model, processor = assemble(eyes, folder, low, device)
        pipe = Pipeline(target=(model, processor), recipe="autoregressive")
        report["test"] = keyword_match(pipe, held_out[: config.measure], captions.TITLE)
    (output / "report.json").write_text(json.dumps(report, indent=1))
    return report


def train_eyes(
    language: Any,
    folder: Path,
    size: EyesSize,
    schedules: tuple[Schedule, Schedule],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    output: Path,
    device: str | torch.device,
    low: torch.dtype,
) -> tuple[Eyes, dict[str, Any]]:
    """Eyes in the dtype `low` for the language model, whose tokenizer lies in `folder`, and what was found on the way;
    interrupted stages in `output`/stages are continued."""
    torch.manual_seed(schedules[0].seed)
    config = size.config(language.config, 0)
    processor = make_processor(config, folder)
    config.image_token_index = placeholder = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    pixels, known = pixels_of(examples, processor), words.vocabulary(examples)
    table = words.word_table(list(known), processor.tokenizer, language.get_input_embeddings().weight.cpu())
    first = words.WordEyes(config, table)
    stage = output / "stages" / "words"
    make_folder(stage)
    data = words.Labelled(examples, pixels, known)
    found = fit(first, lambda model: words.word_loss, data, words.collate, schedules[0], stage, device, low)
    first.float()
    unseen = words.Labelled(held_out, pixels_of(held_out, processor), known)
    share = words.named(first, unseen) if len(unseen) else 0.0
    report: dict[str, Any] = {"words": {"known": len(known), "named_in_test": share, **found}}

    def begin(model: PreTrainedModel) -> Callable[..., dict[str, torch.Tensor]]:
        return captions.caption_loss(language, placeholder)

    stage = output / "stages" / "captions"
    make_folder(stage)
    spoken = captions.Captions(examples, pixels, processor, config.image_seq_length, schedules[1].seed)
    report["captions"] = fit(first.eyes, begin, spoken, captions.collate, schedules[1], stage, device, low)
    report["parameters"] = first.eyes.num_parameters()
    return first.eyes, report
