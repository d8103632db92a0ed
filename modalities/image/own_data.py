"""What an image target draws by itself, to train draft heads on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyspec.api import decode, make_draws
from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Processing
from polyspec.modalities.image.pipeline import Pipeline
from polyspec.modalities.image.target import make_image_target
from polyspec.pipelines import processors
from polyspec.training.data import Corpus, grow_corpus

UNCONDITIONAL = 8
"""Every eighth picture goes with its prompt's unconditional form, which heads see under guidance."""


class DataSource:
    """An image model that draws prompts as it samples by default. See `polyspec.training.train` for `settings`."""

    tokenizer = None

    def __init__(self, settings: Mapping[str, Any]):
        from polyspec.training import read_prompts

        self.prompts = read_prompts(settings.get("prompts") or "emoji_names")
        self.pipe = Pipeline(target=settings.get("target"), device=settings.get("device"), dtype=settings.get("dtype"))
        self.target = make_image_target(self.pipe.model, 1.0)

    def corpus(self, folder: Path, tokens: int = 200_000, batch: int = 32, seed: int = 0, **_: Any) -> Corpus:
        """Pictures of the prompts, over and over, as rows of the adapter's ids, at least `tokens` image tokens."""
        knobs = self.pipe.settings()
        settings = {
            "prompts": self.prompts,
            "model": self.pipe.model.name_or_path,
            "batch": batch,
            "seed": seed,
            **knobs,
        }

        def draw(first: int) -> tuple[list[np.ndarray], list[int]]:
            prompts = [self.prompts[i % len(self.prompts)] for i in range(first, first + batch)]
            return self.draw(prompts, seed + first, first, knobs)

        return grow_corpus(folder, settings, tokens, draw)

    @torch.no_grad()
    def draw(
        self, prompts: list[str], seed: int, first: int, knobs: Mapping[str, Any]
    ) -> tuple[list[np.ndarray], list[int]]:
        """One batch: rows (prompt and image tokens) and the lengths of their prompts."""
        scale, sampling = knobs["guidance_scale"], knobs["do_sample"]
        target = make_image_target(self.pipe.model, scale)
        ids, mask = target.encode(self.pipe.processor, prompts)
        sequences = Sequences(ids, target.image_tokens, mask=mask)
        shaped = {k: v for k, v in knobs.items() if k not in ("guidance_scale", "do_sample")}
        processing = Processing(processors(**shaped) if sampling else [], target.constraint)
        draws = make_draws(self.pipe.method, sampling, seed, len(ids), ids.device)
        decode(self.pipe.method, target, sequences, processing, draws, {})
        drawn = sequences.result()[:, -target.image_tokens :]
        guided = make_image_target(self.pipe.model, 2.0)  # any scale above 1: only its unconditional prompts are wanted
        guided.encode(self.pipe.processor, prompts)
        rows, lengths = [], []
        for row in range(len(prompts)):
            prompt = ids[row][mask[row].bool()]
            if (first + row) % UNCONDITIONAL == UNCONDITIONAL - 1 and guided.guidance is not None:
                other = guided.guidance
                assert other.tokens is not None
                prompt = other.tokens[row] if other.mask is None else other.tokens[row][other.mask[row].bool()]
            rows.append(torch.cat([prompt, drawn[row]]).cpu().numpy().astype(np.int32))
            lengths.append(len(prompt))
        return rows, lengths
