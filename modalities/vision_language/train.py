"""`polyspec task=train modality=vision_language`: a vision tower and a projector for SmolLM2-135M-Instruct.

The language model is frozen; the tower learns, through it, to say what pictures with captions show. The folder that is
left serves as `target=…`, beside the share of held-out pictures it names, with the image and without.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from polyspec import pipelines
from polyspec.errors import CheckpointError, ConfigError
from polyspec.modalities.text.sample import fetch_sample
from polyspec.modalities.vision_language.evaluate import Example, keyword_match
from polyspec.modalities.vision_language.images import open_image
from polyspec.modalities.vision_language.pipeline import Pipeline
from polyspec.modalities.vision_language.sample import PLACEHOLDER, Eyes, EyesConfig, assemble, make_processor
from polyspec.training import make_folder
from polyspec.training.trainer import Schedule, fit

TITLE, KEYWORDS = "What is in the picture?", "Give keywords for the picture."
MOST_KEYWORDS = 5
SKIN = "skin tone"  # variants of emoji that differ in nothing else


@dataclass(frozen=True, slots=True)
class EyesSize:
    """The tower's shape: `image_size` pixels in patches of `patch_size`, each of which becomes a token."""

    image_size: int = 64
    patch_size: int = 16
    hidden_size: int = 256
    layers: int = 6
    heads: int = 4

    def config(self, text: Any, placeholder: int) -> EyesConfig:
        vision = {
            "model_type": "siglip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 4 * self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vision_use_head": False,
        }
        return EyesConfig(
            vision_config=vision,
            text_config=text.to_dict(),
            image_token_index=placeholder,
            image_seq_length=(self.image_size // self.patch_size) ** 2,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )


def read_examples(paths: Sequence[str], split: str) -> list[Example]:
    """The pictures of a split of parquet files with columns image{bytes}, title or caption, keywords or tags, split."""
    import pandas

    found = []
    for path in paths:
        if not Path(path).is_file():
            raise CheckpointError(f"there is no {path}; set train.data.paths=[…] to parquet files with images")
        table = pandas.read_parquet(path)
        title = "title" if "title" in table else "caption"
        keywords = "keywords" if "keywords" in table else "tags"
        if lacking := [c for c in ("image", title, keywords, "split") if c not in table]:
            raise ConfigError(
                f"{path} has no column {lacking[0]}; it needs image, title or caption, keywords or tags, split"
            )
        rows = table[table["split"] == split]
        for image, name, words in zip(rows["image"], rows[title], rows[keywords], strict=True):
            if isinstance(name, str) and name.strip() and SKIN not in name:
                given = words.split(",") if isinstance(words, str) else list(words if words is not None else ())
                picture = open_image(Image.open(io.BytesIO(image["bytes"])))
                found.append(Example(picture, name.strip(), tuple(w.strip() for w in map(str, given) if w.strip())))
    if not found:
        raise ConfigError(f"no picture in split {split!r} of {', '.join(paths)}")
    return found


class Captions(Dataset[dict[str, Tensor]]):
    """Pictures with a question and its answer as `pixels [3, H, W]`, `tokens [L]`, `labels [L]` (-100 but for answers).

    Pictures are mirrored at random; questions after keywords alternate with those after the title."""

    def __init__(self, examples: Sequence[Example], processor: Any, seed: int = 0):
        self.examples, self.processor, self.random = examples, processor, random.Random(seed)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        example = self.examples[item]
        picture, tokenizer = example.image, self.processor.tokenizer
        if self.random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        question, answer = TITLE, example.title
        if example.keywords and self.random.random() < 0.3:
            question, answer = KEYWORDS, ", ".join(example.keywords[:MOST_KEYWORDS])
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        given = self.processor(text=prompt, images=picture, return_tensors="pt")
        said = tokenizer(answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        asked = given["input_ids"][0]
        labels = torch.cat([torch.full_like(asked, -100), said])
        return {"pixels": given["pixel_values"][0], "tokens": torch.cat([asked, said]), "labels": labels}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows padded on the right, with a mask `[B, L]`."""
    tokens = pad_sequence([r["tokens"] for r in rows], batch_first=True)
    lengths = torch.tensor([len(r["tokens"]) for r in rows])
    return {
        "pixels": torch.stack([r["pixels"] for r in rows]),
        "tokens": tokens,
        "labels": pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100),
        "mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long(),
    }


def caption_loss(language: Any, placeholder: int) -> Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]:
    """Cross-entropy of the answers behind what `Eyes` make of the pictures, through a frozen language model."""

    def losses(eyes: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features = eyes(batch["pixels"]).flatten(0, 1)
        embeds = language.get_input_embeddings()(batch["tokens"])
        at = (batch["tokens"] == placeholder)[..., None]
        embeds = embeds.masked_scatter(at, features.to(embeds.dtype))
        hidden = language.model(inputs_embeds=embeds, attention_mask=batch["mask"], use_cache=False).last_hidden_state
        labels = batch["labels"][:, 1:]
        answered = labels != -100  # the output layer is the dearest: only where it counts
        logits = language.lm_head(hidden[:, :-1][answered]).float()
        right = (logits.argmax(-1) == labels[answered]).float().mean()
        return {"loss": functional.cross_entropy(logits, labels[answered]), "accuracy": right}

    return losses


def train(config: Any) -> dict[str, Any]:
    """Train, or continue, what the `train` group describes, and measure it on the test split; the report is also left in
    `output`/report.json."""
    from hydra.utils import instantiate

    output = Path(str(config.output))
    make_folder(output)
    device = config.device or pipelines.default_device()
    size, schedule = instantiate(config.size), instantiate(config.schedule)
    paths = [str(p) for p in config.data.paths]
    folder = Path(str(config.language)) if config.language else fetch_sample()
    low = pipelines.as_dtype(config.dtype, device)
    eyes = train_eyes(folder, size, schedule, read_examples(paths, "train"), output, device, low)
    report: dict[str, Any] = {"parameters": eyes.num_parameters(), "minutes": config.schedule.minutes}
    if config.measure:
        held_out = read_examples(paths, "test")
        random.Random(0).shuffle(held_out)
        model, processor = assemble(eyes, folder, low, device)
        pipe = Pipeline(target=(model, processor), recipe="autoregressive")
        report["test"] = keyword_match(pipe, held_out[: config.measure], TITLE)
    (output / "report.json").write_text(json.dumps(report, indent=1))
    return report


def train_eyes(
    folder: Path,
    size: EyesSize,
    schedule: Schedule,
    examples: Sequence[Example],
    output: Path,
    device: str | torch.device,
    low: torch.dtype,
) -> Eyes:
    """Eyes for the language model in `folder`, saved to `output`, where an interrupted training is continued."""
    language: Any = pipelines.load(AutoModelForCausalLM.from_pretrained, folder, dtype=low).to(device).eval()
    language.requires_grad_(False)
    tokenizer: Any = pipelines.load(AutoTokenizer.from_pretrained, folder)
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    torch.manual_seed(schedule.seed)
    eyes = Eyes(size.config(language.config, placeholder))
    data = Captions(examples, make_processor(eyes.config, folder), schedule.seed)

    def begin(model: PreTrainedModel) -> Callable[..., dict[str, Tensor]]:
        return caption_loss(language, placeholder)

    fit(eyes, begin, data, collate, schedule, output, device, low)
    return eyes
