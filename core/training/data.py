"""Self-distillation data: the target's own continuations of prompts.

Draft heads predict what the target will say, so they are trained on what it does say. The corpus is a folder of shards
that grows batch by batch; generating again with the same settings continues where the last run stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from polyspec.errors import CheckpointError, InputError

SETTINGS = "corpus.json"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token rows laid end to end: row i is `tokens[starts[i]:starts[i + 1]]`, its first `prompts[i]` the prompt."""

    tokens: np.ndarray  # [total] int32
    starts: np.ndarray  # [rows + 1] int64
    prompts: np.ndarray  # [rows] int64

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, index: int) -> Tensor:
        """Row `index` as `[T]` long."""
        return torch.from_numpy(self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int64))

    def generated(self) -> int:
        """Tokens the target made, prompts left out."""
        return int(len(self.tokens) - self.prompts.sum())

    def frequent(self, count: int, vocab_size: int) -> Tensor:
        """The `count` token ids generated most often, ascending `[count]` long: a trimmed vocabulary (FR-Spec,
        2502.14856). Of ids that do not occur the lowest come first: tokenizers number what is frequent early."""
        index = np.arange(len(self.tokens)) - np.repeat(self.starts[:-1], np.diff(self.starts))
        generated = self.tokens[index >= np.repeat(self.prompts, np.diff(self.starts))]
        counts = np.bincount(generated, minlength=vocab_size)
        return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))


def corpus_of(rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> Corpus:
    """A corpus of token lists, the first `prompts[i]` tokens of row i being its prompt."""
    lengths = np.array([0, *(len(row) for row in rows)])
    tokens = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    return Corpus(tokens, np.cumsum(lengths), np.asarray(prompts, dtype=np.int64))


def joined(parts: Sequence[Corpus]) -> Corpus:
    """All rows of several corpora, one behind the other."""
    return join([{"tokens": c.tokens, "lengths": np.diff(c.starts), "prompts": c.prompts} for c in parts])


def generate_corpus(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    folder: str | Path,
    *,
    tokens: int = 200_000,
    batch: int = 32,
    max_new_tokens: int = 160,
    temperature: float | Sequence[float] = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    inputs: Callable[[range], Mapping[str, Any]] | None = None,
    note: Mapping[str, Any] | None = None,
) -> Corpus:
    """Let `model` continue `prompts` (token lists, over and over, each time with new noise) until it made `tokens`.

    temperature: 0 for the likeliest tokens; several are used in turn, one a pass over the prompts. A shard is written
    after every batch. Row i of the corpus continues prompt i mod len(prompts), and a batch's noise is seeded by its first
    row, so the corpus does not depend on where it was interrupted. inputs: what else the model is given, pictures say, for
    rows of the corpus with these numbers, padded on the left; note: what says which. Raises InputError without prompts,
    CheckpointError if `folder` holds a corpus made with other settings.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise InputError("no prompts to continue: give at least one, and none of them empty")
    temperatures = [*temperature] if isinstance(temperature, Sequence) else [temperature]
    knobs = {"max_new_tokens": max_new_tokens, "top_k": top_k, "top_p": top_p}
    settings = {
        "prompts": sha256(json.dumps([list(map(int, p)) for p in prompts]).encode()).hexdigest(),
        "vocab_size": model.config.get_text_config(decoder=True).vocab_size,
        "batch": batch,
        "max_new_tokens": max_new_tokens,
        "temperature": temperatures if len(temperatures) > 1 else temperatures[0],
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        **(note or {}),
    }

    def draw(first: int) -> tuple[list[np.ndarray], list[int]]:
        numbers = range(first, first + batch)
        rows = [list(prompts[i % len(prompts)]) for i in numbers]
        now = {**knobs, "temperature": temperatures[first // len(prompts) % len(temperatures)]}
        extra = inputs(numbers) if inputs else {}
        return continue_prompts(model, rows, seed + first, now, **extra), [len(r) for r in rows]

    return grow_corpus(folder, settings, tokens, draw)


def grow_corpus(
    folder: str | Path, settings: dict[str, Any], tokens: int, draw: Callable[[int], tuple[list[np.ndarray], list[int]]]
) -> Corpus:
    """The corpus in `folder`, made longer until it holds `tokens` generated tokens.

    draw: from the number of rows there are to the next rows (int32, prompts included) and their prompts' lengths; they
    are stored as a shard. settings: what rows depend on. Raises CheckpointError if `folder` was made with others.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / SETTINGS, settings)
    shards = list(read_shards(folder))
    made = sum(int(s["tokens"].size - s["prompts"].sum()) for s in shards)
    with tqdm(desc="generating", total=tokens, initial=made, unit=" tokens") as bar:
        while made < tokens:
            shard = pack(*draw(sum(len(s["lengths"]) for s in shards)))
            save_shard(folder, len(shards), shard)
            shards.append(shard)
            new = int(shard["tokens"].size - shard["prompts"].sum())
            made += new
            bar.update(new)
    return join(shards)


def continue_prompts(
    model: PreTrainedModel, prompts: list[list[int]], seed: int, knobs: dict[str, Any], **inputs: Any
) -> list[np.ndarray]:
    """One batch: prompts and what the plain loop samples after them, up to and including end-of-sequence.

    knobs: generate's; temperature 0 takes the likeliest token; inputs: what else the model is given."""
    import polyspec
    from polyspec.decoding.chain import Chain
    from polyspec.verification import speculative_sampling

    config = model.generation_config
    pad = config.pad_token_id if config and config.pad_token_id is not None else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    plain = polyspec.custom_generate("autoregressive", seed=seed)
    # noise for every token, which the recipe shares with others, costs more here than the rest of drawing
    plain.method = replace(plain.method, loop=Chain(speculative_sampling), draws="independent")
    generate: Any = model.generate
    sampling = {"do_sample": True, **knobs}
    if not knobs["temperature"]:
        sampling = {"do_sample": False, "max_new_tokens": knobs["max_new_tokens"]}
    out = generate(ids, attention_mask=mask, pad_token_id=pad, custom_generate=plain, **inputs, **sampling)
    ends = config.eos_token_id if config else None
    stops = np.atleast_1d(np.asarray([] if ends is None else ends))
    rows = []
    for prompt, row in zip(prompts, out[:, width:].cpu().numpy(), strict=True):
        end = np.isin(row, stops)
        rows.append(np.concatenate([prompt, row[: end.argmax() + 1] if end.any() else row]).astype(np.int32))
    return rows


def load_corpus(folder: str | Path) -> Corpus:
    """The corpus in `folder`. Raises CheckpointError if there is none."""
    shards = list(read_shards(Path(folder)))
    if not shards:
        raise CheckpointError(f"{folder} holds no training data; generate some first or give another folder")
    return join(shards)


# -- shards: {"tokens" [n] int32, "lengths" [rows] int64, "prompts" [rows] int64} --------------------------------------


def pack(rows: list[np.ndarray], prompts: list[int]) -> dict[str, np.ndarray]:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return {"tokens": np.concatenate(rows), "lengths": lengths, "prompts": np.array(prompts, dtype=np.int64)}


def join(shards: list[dict[str, np.ndarray]]) -> Corpus:
    lengths = np.concatenate([[0], *(s["lengths"] for s in shards)])
    tokens, prompts = (np.concatenate([s[k] for s in shards]) for k in ("tokens", "prompts"))
    return Corpus(tokens, np.cumsum(lengths), prompts)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05}.safetensors"


def save_shard(folder: Path, index: int, shard: dict[str, np.ndarray]) -> None:
    path = shard_path(folder, index)
    partial = path.with_suffix(".partial")
    save_file(shard, partial)
    partial.replace(path)


def read_shards(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    index = 0
    while (path := shard_path(folder, index)).exists():
        try:
            yield load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it to have it made again") from error
        index += 1


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write `settings` to a new folder; CheckpointError if an old one was made with others, naming the first."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
        return
    old = json.loads(path.read_text())
    for key, value in settings.items():
        if old.get(key) != value:
            raise CheckpointError(
                f"{path.parent} was made with {key}={old.get(key)!r}, not {value!r}; choose another folder or delete it"
            )
