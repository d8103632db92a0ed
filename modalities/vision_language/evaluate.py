"""What the vision-language bench needs, and how well a model names what it sees."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from polyspec.bench.calls import time_calls
from polyspec.drafting.draft_model import load_draft_model
from polyspec.errors import ConfigError, InputError
from polyspec.modalities.text.evaluate import count_new
from polyspec.modalities.vision_language.images import open_image
from polyspec.pipelines import shipped_drafter
from polyspec.prompts import prompt_file
from polyspec.recipe import find_recipe
from polyspec.target import make_target

STOP = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "this", "to", "with")
) | {"picture", "image", "shows", "photo"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


@dataclass(frozen=True, slots=True)
class Example:
    """A picture, its name (may be empty), and words that fit it."""

    image: Image.Image
    title: str
    keywords: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture; kind: its category, measured apart, such as whether the answer depends on it."""

    prompt: str
    image: Image.Image
    kind: str


def bench_prompts(prompts: Mapping[str, Any]) -> list[Question]:
    """As many questions as there are pictures, or the other way round: the shorter list starts again. A question that names
    its own `image` (beside the JSONL file or in the folder of pictures) is asked of that."""
    rows = [json.loads(line) for line in prompt_file(prompts["questions"]).read_text("utf-8").splitlines() if line]
    if not rows or not all(isinstance(row.get("prompt"), str) for row in rows):
        raise InputError(f"bench.prompts.questions={prompts['questions']} needs a line with a prompt for each question")
    given = prompts.get("pictures")
    own = [row for row in rows if "image" in row]
    pictures = read_pictures(given, prompts.get("split", "test")) if given and len(own) < len(rows) else []
    beside = Path(given) if given and Path(given).is_dir() else Path(str(prompts["questions"])).parent
    found = []
    for k in range(max(len(rows), len(pictures))):
        row = rows[k % len(rows)]
        if "image" not in row and not pictures:
            raise ConfigError("questions without an image need pictures: set bench.prompts.pictures=parquet or folder")
        picture = open_image(beside / row["image"]) if "image" in row else pictures[k % len(pictures)]
        found.append(Question(row["prompt"], picture, str(row.get("category", ""))))
    return found


def read_pictures(path: str, split: str) -> list[Image.Image]:
    """The pictures of a folder, or of a parquet file's split, in an order that mixes neighbours."""
    from polyspec.modalities.vision_language.train.data import read_examples

    if Path(path).is_dir():
        files = sorted(f for f in Path(path).iterdir() if f.suffix.lower() in PICTURES)
        if not files:
            raise InputError(f"no picture in {path}")
        return [open_image(f) for f in files]
    examples = read_examples([path], split, alike=1)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return [examples[int(i)].image for i in order]


def ask(pipe: Any, batch: Sequence[Question], **arguments: Any) -> Any:
    return pipe([q.prompt for q in batch], [q.image for q in batch], **arguments)


def prepare(pipe: Any, batches: Sequence[Sequence[Question]]) -> None:
    """Captions are made before the clock starts, as with a captioner of one's own."""
    if pipe is not None and pipe.captioner is not None:
        for batch in batches:
            pipe.describe([[q.image] for q in batch])


def transformers_generate(pipe: Any, batch: Sequence[Question], **arguments: Any) -> int:
    """Answer with plain `generate`; the number of new tokens, padding not counted.

    assistant_model: a folder, or None for the shipped drafter: transformers' own assisted generation, which takes one
    prompt at a time, so a batch is answered one by one."""
    if "assistant_model" not in arguments:
        return answer(pipe, batch, **arguments)
    with assistant(pipe, arguments.pop("assistant_model")) as model:
        return sum(answer(pipe, [q], assistant_model=model, **arguments) for q in batch)


def answer(pipe: Any, batch: Sequence[Question], **arguments: Any) -> int:
    inputs = pipe.encode([q.prompt for q in batch], [[q.image] for q in batch])
    ids = pipe.model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]
    return count_new(pipe.model, ids)


@contextmanager
def assistant(pipe: Any, folder: str | None) -> Iterator[Any]:
    """The drafter as transformers' assistant: it is handed the target's inputs, of which a text model ignores pictures."""
    found = folder or shipped_drafter(pipe.sample, find_recipe("text_only_draft"), "draft_model")
    if found is None:
        raise ConfigError("no drafter comes with this target: set bench.draft_model=folder of one with its tokenizer")
    model: Any = load_draft_model(str(found)).to(pipe.model.device)  # type: ignore[arg-type]
    own = model.generate

    def blind(*args: Any, pixel_values: Any = None, **given: Any) -> Any:
        return own(*args, **given)

    model.generate = blind
    try:
        yield model
    finally:
        del model.generate  # the class's own shows again


def call_seconds(pipe: Any, batch: Sequence[Question], sizes: Sequence[int], **arguments: Any) -> dict[int, float]:
    """Median seconds of a target call of N tokens a row, N in `sizes`, behind the prompts; the sizes in turn."""
    inputs = pipe.encode([q.prompt for q in batch], [[q.image] for q in batch])
    target = make_target(pipe.model)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    target.prefill(ids, mask, capacity=ids.shape[1] + max(sizes), **inputs)
    return time_calls(target, ids[:, -1:], sizes)


def words(text: str) -> set[str]:
    """The words of a text that say something, in lower case."""
    return set(re.findall(r"[^\W\d_]{3,}", text.lower())) - STOP


def match(answer: str, example: Example) -> tuple[bool, bool]:
    """(exact: every word of the title is in the answer; partial: a word of the title or of the keywords is)."""
    said, title = words(answer), words(example.title)
    return bool(title) and title <= said, bool(said & (title | words(" ".join(example.keywords))))


def matches(
    pipe: Any, examples: Sequence[Example], question: str, seen: bool = True, max_new_tokens: int = 16, batch: int = 8
) -> dict[str, float]:
    """Shares of exact matches among the examples with a title and of partial ones among all, answered greedily; seen: with
    the picture, or from the question alone."""
    found: list[tuple[bool, bool]] = []
    asking = partial(pipe, max_new_tokens=max_new_tokens, do_sample=False)
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        answers = asking([question] * len(part), [e.image for e in part] if seen else None).outputs
        found += [match(answer, e) for answer, e in zip(answers, part, strict=True)]
    titled = sum(bool(words(e.title)) for e in examples)
    exact, partly = (sum(column) for column in zip(*found, strict=True))
    return {"exact": exact / max(titled, 1), "partial": partly / max(len(found), 1)}


def keyword_match(pipe: Any, examples: Sequence[Example], question: str, **knobs: Any) -> dict[str, dict[str, float]]:
    """`matches` with the image, and without it: what the language model guesses from the question alone."""
    return {
        name: matches(pipe, examples, question, seen, **knobs)
        for name, seen in (("with_image", True), ("without_image", False))
    }
