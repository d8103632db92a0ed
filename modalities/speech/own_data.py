"""What a speech target says by itself, to train draft heads on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspec.errors import InputError
from polyspec.modalities.speech.pipeline import Pipeline
from polyspec.training.data import Corpus, grow_corpus


class DataSource:
    """A speech model that reads texts as it samples by default. See `polyspec.training.train` for `settings`; prompts: a file
    with a sentence a line."""

    tokenizer = None

    def __init__(self, settings: Mapping[str, Any]):
        from polyspec.training import read_prompts

        if settings.get("prompts") is None:
            raise InputError(
                "heads for speech learn from texts read aloud; set train.prompts=<file with a sentence a line>"
            )
        self.prompts = read_prompts(settings["prompts"])
        self.pipe = Pipeline(
            target=settings.get("target"),
            recipe="autoregressive",
            device=settings.get("device"),
            dtype=settings.get("dtype"),
        )
        self.target = self.pipe.speech.target

    def corpus(self, folder: Path, tokens: int = 200_000, batch: int = 32, seed: int = 0, **_: Any) -> Corpus:
        """The prompts read aloud, over and over, until there are `tokens` of it."""
        settings = {"prompts": len(self.prompts), "model": self.pipe.model.name_or_path, "batch": batch, "seed": seed}

        def draw(first: int) -> tuple[list[np.ndarray], list[int]]:
            texts = [self.prompts[i % len(self.prompts)] for i in range(first, first + batch)]
            found = [self.pipe.speech.pieces(text)[0] for text in texts]
            said, _ = self.pipe.tokens(found, [seed + first + row for row in range(batch)], None)
            ids, mask, _ = self.pipe.speech.encode(found)
            prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
            rows = [np.array(p + s, dtype=np.int32) for p, s in zip(prompts, said, strict=True)]
            return rows, [len(p) for p in prompts]

        return grow_corpus(folder, settings, tokens, draw)
