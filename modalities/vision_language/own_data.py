"""What a vision-language target says of pictures, beside them and without them, to train draft heads on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from polyspec.errors import ConfigError
from polyspec.modalities.vision_language.evaluate import read_pictures
from polyspec.modalities.vision_language.pipeline import Pipeline
from polyspec.prompts import load_prompts
from polyspec.target import make_target
from polyspec.training.data import Corpus, generate_corpus

ASIDE = "Leave the picture aside. "


class DataSource:
    """A vision-language model that answers. Of three rows one asks about its picture, one has a picture and asks for
    something else, one has none, so that heads serve all of these. See `polyspec.training.train` for `settings`: prompts are
    questions about pictures; `pictures` is a parquet file, of which the split `train` is taken, or a folder."""

    def __init__(self, settings: Mapping[str, Any]):
        from polyspec.training import read_prompts

        if not settings.get("pictures"):
            raise ConfigError(
                "there is nothing to ask about: set train.pictures= to a parquet file or folder of pictures"
            )
        self.place = str(settings["pictures"])
        self.pictures = read_pictures(self.place, "train")
        self.questions = read_prompts(settings.get("prompts") or "train_picture_questions")
        self.others = load_prompts("train_chat")
        knobs = {k: settings.get(k) for k in ("target", "device", "dtype")}
        self.pipe = Pipeline(recipe="autoregressive", **knobs)
        self.target, self.tokenizer = make_target(self.pipe.model), self.pipe.tokenizer

    def corpus(self, folder: Path, own_prompts: int = 0, **knobs: Any) -> Corpus:
        """Answers; knobs as for `generate_corpus`."""
        if own_prompts:
            raise ConfigError("own_prompts is for models of text; set it to 0 and give more prompts or pictures")
        asked = (self.asked(row) for row in range(3 * len(self.pictures)))
        prompts = [self.pipe.encode([q], [p])["input_ids"][0].tolist() for q, p in asked]
        note = {"pictures": self.place, "count": len(self.pictures)}
        return generate_corpus(self.pipe.model, prompts, folder, inputs=self.inputs, note=note, **knobs)

    def asked(self, row: int) -> tuple[str, list[Image.Image]]:
        """What a row of the corpus asks, and its pictures."""
        number, kind = divmod(row % (3 * len(self.pictures)), 3)
        picture = self.pictures[number]
        if kind == 0:
            return self.questions[number % len(self.questions)], [picture]
        other = self.others[(2 * number + kind) % len(self.others)]
        return (ASIDE + other, [picture]) if kind == 1 else (other, [])

    def inputs(self, rows: range) -> dict[str, Any]:
        """What the model is given beside the tokens of these rows."""
        questions, pictures = zip(*map(self.asked, rows), strict=True)
        found = self.pipe.encode(questions, pictures)
        return {k: v for k, v in found.items() if k not in ("input_ids", "attention_mask")}
