"""What the speech bench needs, and how well speech can be understood."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from polyspec.bench.calls import time_calls
from polyspec.prompts import load_prompts


def bench_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts of a file in samples/prompts by its name, or the given list."""
    return load_prompts(prompts) if isinstance(prompts, str) else list(prompts)


def transformers_generate(pipe: Any, prompts: Sequence[str], **arguments: Any) -> int:
    """Speak with the model's own `generate`, sound and all; the number of new tokens."""
    found = [piece for text in prompts for piece in pipe.speech.pieces(text)]
    spoken = own_tokens(pipe, found, **arguments)
    for tokens in spoken:
        pipe.speech.voice().push(tokens, last=True)
    return sum(len(tokens) for tokens in spoken)


def own_tokens(pipe: Any, found: Sequence[str], **arguments: Any) -> list[list[int]]:
    """New tokens of each piece as the model's own `generate` draws them, the end included."""
    return pipe.speech.generate(found, **pipe.settings(**arguments))


def call_seconds(pipe: Any, prompts: Sequence[str], sizes: Sequence[int], **arguments: Any) -> dict[int, float]:
    """Median seconds of a target call of N tokens a row, N in `sizes`, behind the prompts; the sizes in turn."""
    found = [pipe.speech.pieces(text)[0] for text in prompts]
    ids, mask, _ = pipe.speech.encode(found)
    target = pipe.speech.target
    target.hidden_layers = ()
    target.prefill(ids, mask, capacity=ids.shape[1] + max(sizes))
    return time_calls(target, ids[:, -1:], sizes)


@cache
def normaliser() -> EnglishTextNormalizer:
    return EnglishTextNormalizer({})  # without its table of British spellings, which comes with checkpoints


def words(text: str) -> list[str]:
    """Words as error rates of Whisper compare them (2212.04356, appendix C): lower case, no punctuation, numbers as
    figures, contractions written out."""
    return normaliser()(text.replace("’", "'")).split()


def word_error_rate(references: Sequence[str], heard: Sequence[str]) -> float:
    """Substituted, left out and added words over the words of the references, all texts together."""
    errors = sum(distance(words(a), words(b)) for a, b in zip(references, heard, strict=True))
    return errors / max(1, sum(len(words(a)) for a in references))


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
