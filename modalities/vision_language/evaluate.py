"""How well a vision-language model names what it sees: keyword match, with the image and without."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

STOP = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "this", "to", "with")
) | {"picture", "image", "shows", "photo"}


@dataclass(frozen=True, slots=True)
class Example:
    """A picture, its name, and words that fit it."""

    image: Image.Image
    title: str
    keywords: tuple[str, ...]


def words(text: str) -> set[str]:
    """The words of a text that say something, in lower case."""
    return set(re.findall(r"[^\W\d_]{3,}", text.lower())) - STOP


def match(answer: str, example: Example) -> tuple[bool, bool]:
    """(exact: every word of the title is in the answer; partial: a word of the title or of the keywords is)."""
    said, title = words(answer), words(example.title)
    return bool(title) and title <= said, bool(said & (title | words(" ".join(example.keywords))))


def keyword_match(
    pipe: Any, examples: Sequence[Example], question: str, max_new_tokens: int = 16, batch: int = 8
) -> Mapping[str, Mapping[str, float]]:
    """Shares of exact and partial matches over `examples`, greedily: `with_image`, and `without_image` for what the
    language model guesses from the question alone."""
    report = {}
    for name, seen in (("with_image", True), ("without_image", False)):
        found: list[tuple[bool, bool]] = []
        for start in range(0, len(examples), batch):
            part = examples[start : start + batch]
            images = [e.image for e in part] if seen else None
            answers = pipe([question] * len(part), images, max_new_tokens=max_new_tokens, do_sample=False).outputs
            found += [match(answer, e) for answer, e in zip(answers, part, strict=True)]
        exact, partial = (sum(column) / max(len(found), 1) for column in zip(*found, strict=True))
        report[name] = {"exact": exact, "partial": partial}
    return report
