"""Pictures with names and keywords, from parquet files, and what hides a picture's numbers from a model that memorises."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from polyspec.errors import CheckpointError, ConfigError
from polyspec.modalities.vision_language.evaluate import Example
from polyspec.modalities.vision_language.images import open_image

SKIN = "skin tone"  # variants of emoji that differ in nothing else
SERIES = 8  # pictures of one title: with more of them it is a collection's title and names none
NOISE = frozenset({"hash", "openclipart"})  # Open Clip Art's own keywords


def read_examples(paths: Sequence[str], split: str, alike: int = 60) -> list[Example]:
    """The pictures of a split of parquet files with columns image{bytes}, title or caption, keywords or tags, split.

    A column subgroup or category adds a keyword. A title that many pictures share names none of them: it is left empty,
    and no more than `alike` of them are kept."""
    import pandas

    found = []
    for path in paths:
        if not Path(path).is_file():
            raise CheckpointError(f"there is no {path}; set train.data.paths=[…] to parquet files with images")
        table: Any = pandas.read_parquet(path)
        title = "title" if "title" in table else "caption"
        keywords = "keywords" if "keywords" in table else "tags"
        if lacking := [c for c in ("image", title, keywords, "split") if c not in table]:
            raise ConfigError(
                f"{path} has no column {lacking[0]}; it needs image, title or caption, keywords or tags, split"
            )
        table = table[table[title].map(lambda t: isinstance(t, str) and bool(t.strip()) and SKIN not in t)]
        shared = Counter(table[title])
        kind = next((c for c in ("subgroup", "category") if c in table), None)
        taken: Counter[str] = Counter()
        for row in table[table["split"] == split].to_dict("records"):
            name = row[title]
            taken[name] += 1
            if taken[name] > alike:
                continue
            given = row[keywords]
            said = given.split(",") if isinstance(given, str) else [] if given is None else [str(k) for k in given]
            said += [str(row[kind]).rpartition("/")[2]] if kind and isinstance(row[kind], str) else []
            picture = open_image(Image.open(io.BytesIO(row["image"]["bytes"])))
            example = Example(picture, "" if shared[name] > SERIES else tidy(name), tidy_all(said))
            if example.title or example.keywords:
                found.append(example)
    if not found:
        raise ConfigError(f"no picture in split {split!r} of {', '.join(paths)}")
    return found


def tidy(name: str) -> str:
    """A file's or catalogue's name as one would say it: no numbers, no brackets, no _ and -."""
    name = re.sub(r"\([^)]*\)|Clipart by [^-]* - ", " ", name)
    return " ".join(re.sub(r"[\d_\-.\"]+", " ", name).split()).strip(" :,")


def tidy_all(keywords: Sequence[str]) -> tuple[str, ...]:
    """Keywords tidied, each once."""
    tidied = (tidy(k).lower() for k in keywords)
    return tuple(dict.fromkeys(k for k in tidied if k and k not in NOISE))


def pixels_of(examples: Sequence[Example], processor: Any, batch: int = 256) -> Tensor:
    """The pictures as the tower sees them, `[N, 3, H, W]` in half precision."""
    parts = []
    for start in range(0, len(examples), batch):
        pictures = [e.image for e in examples[start : start + batch]]
        parts.append(processor.image_processor(pictures, return_tensors="pt")["pixel_values"].half())
    return torch.cat(parts)


def augmented(pixels: Tensor) -> Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1], white around, turned, scaled, moved, mirrored and recoloured a little at random."""
    count = len(pixels)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape)

    angle, size = between(-0.3, 0.3), torch.exp(between(-0.3, 0.3))
    stretch = torch.exp(between(-0.15, 0.15))
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    cos, sin, shift = angle.cos() * size, angle.sin() * size, between(-0.18, 0.18, 2)
    rows = torch.stack(
        [cos * stretch * mirror, -sin, shift[:, 0], sin * stretch * mirror, cos / stretch, shift[:, 1]], 1
    )
    grid = functional.affine_grid(rows.view(count, 2, 3), list(pixels.shape), align_corners=False)
    ink = functional.grid_sample(1 - pixels.float(), grid, align_corners=False)  # outside lies no ink
    gain = torch.exp(between(-0.25, 0.25, 1, 1, 1) + between(-0.12, 0.12, 3, 1, 1))
    return (1 - ink * gain).clamp(-1, 1)


def mixing(count: int, share: float = 0.5, strength: float = 0.4) -> tuple[Tensor, Tensor]:
    """(partner `[B]`, weight `[B]` of the own picture) for mixup (1710.09412) of a `share` of a batch."""
    weight = torch.distributions.Beta(strength, strength).sample((count,))
    weight = torch.where(torch.rand(count) < share, torch.maximum(weight, 1 - weight), 1.0)
    return torch.randperm(count), weight


def rarity(counts: Sequence[int]) -> list[float]:
    """How much a word says: the rarer the more."""
    return [1 / math.sqrt(max(n, 1)) for n in counts]
