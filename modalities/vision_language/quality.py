"""What a bench may say of answers' quality: how many held-out pictures each contestant names."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from polyspec.modalities.vision_language.evaluate import matches
from polyspec.modalities.vision_language.train.captions import TITLE
from polyspec.modalities.vision_language.train.data import read_examples


def bench_quality(
    pipes: Mapping[str, Any], settings: Mapping[str, Any], arguments: Mapping[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """Shares of `settings`' pictures whose title is in the answer (exact), or a word of title or keywords (partial); and
    the same of the first pipe without the pictures."""
    examples = read_examples([settings["path"]], settings["split"], alike=3)
    random.Random(0).shuffle(examples)
    examples = examples[: settings["pictures"]]
    found = {label: matches(pipe, examples, TITLE) for label, pipe in pipes.items()}
    blind = next(iter(pipes))
    return {**found, f"{blind} without the image": matches(pipes[blind], examples, TITLE, seen=False)}
