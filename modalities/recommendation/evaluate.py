"""How good lists are: Recall@K and NDCG@K, and popularity to stand beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from math import log2
from typing import Any

import torch

from polyspec.bench.calls import time_calls
from polyspec.errors import InputError
from polyspec.target import make_target


def recall(lists: Sequence[Sequence[int]], targets: Sequence[Collection[int]], k: int) -> float:
    """The mean share of a user's targets that are among the first k of the list: with one target the hit rate. InputError
    unless there is a list for each of at least one set of targets, none empty."""
    return mean(lists, targets, k, lambda hits, wanted: sum(hits) / wanted)


def ndcg(lists: Sequence[Sequence[int]], targets: Sequence[Collection[int]], k: int) -> float:
    """The mean of Σ_{hits at rank i} 1/log2(i+1), over its highest possible value: NDCG@k with binary relevance. InputError
    as for `recall`."""

    def score(hits: list[bool], wanted: int) -> float:
        gain = sum(1 / log2(i + 2) for i, hit in enumerate(hits) if hit)
        return gain / sum(1 / log2(i + 2) for i in range(min(k, wanted)))

    return mean(lists, targets, k, score)


def mean(
    lists: Sequence[Sequence[int]],
    targets: Sequence[Collection[int]],
    k: int,
    score: Callable[[list[bool], int], float],
) -> float:
    """The mean over users of `score(which of the first k hit, number of targets)`."""
    if len(lists) != len(targets) or not lists:
        raise InputError(f"{len(lists)} lists for {len(targets)} users; give one a user, and at least one")
    if k < 1 or not all(targets):
        raise InputError("k must be ≥ 1, and every user needs at least one target")
    total = 0.0
    for found, wanted in zip(lists, targets, strict=True):
        wanted = set(wanted)
        total += score([item in wanted for item in list(found)[:k]], len(wanted))
    return total / len(lists)


def popularity(histories: Iterable[Sequence[int]], k: int, seen: Sequence[Collection[int]] = ()) -> list[list[int]]:
    """The k items that occur most in `histories`, for each of the users' `seen` without what they have seen; ties by id."""
    ranked = [i for i, _ in sorted(Counter(i for h in histories for i in h).items(), key=lambda x: (-x[1], x[0]))]
    found = []
    for known in seen:
        known = set(known)
        best = ranked[: k + len(known)]
        found.append([i for i in best if i not in known][:k])
    return found


# -- what the bench needs ------------------------------------------------------------------------------------------------


def bench_prompts(prompts: str | Sequence[Sequence[int]]) -> list[list[int]]:
    """Histories: a list of them, the test users of `movielens`, or those of a folder of splits."""
    if not isinstance(prompts, str):
        return [list(history) for history in prompts]
    from polyspec.modalities.recommendation.data import movielens, parquet_splits

    return [e.history for e in (movielens() if prompts == "movielens" else parquet_splits(prompts)).test]


@torch.no_grad()
def transformers_generate(pipe: Any, prompts: Sequence[Sequence[int]], k: int = 10, **_: Any) -> int:
    """Lists by the model's own constrained beam search; the number of tokens in each, times the histories."""
    items, depth = pipe.items, pipe.items.trie.depth
    rows = [items.prompt(h, pipe.room - depth) for h in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=pipe.model.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=pipe.model.device)
    allowed = continuations(items)
    pipe.model.generate(
        ids,
        attention_mask=mask,
        num_beams=k,
        num_return_sequences=k,
        do_sample=False,
        max_new_tokens=depth,
        eos_token_id=None,
        pad_token_id=0,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[width:].tolist())],
    )
    return depth * len(rows)


@lru_cache(maxsize=1)
def continuations(items: Any) -> dict[tuple[int, ...], list[int]]:
    """For the beginnings of all items' tokens, what may follow."""
    found: dict[tuple[int, ...], set[int]] = {}
    for tokens in items.tokens.tolist():
        for n in range(len(tokens)):
            found.setdefault(tuple(tokens[:n]), set()).add(tokens[n])
    return {beginning: sorted(following) for beginning, following in found.items()}


def call_seconds(
    pipe: Any, prompts: Sequence[Sequence[int]], sizes: Sequence[int], k: int = 10, **_: Any
) -> dict[int, float]:
    """Median seconds of a target call over N - 1 drafted nodes a row beside its k beams, behind the histories."""
    rows = [pipe.items.prompt(h, pipe.room - pipe.items.trie.depth) for h in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=pipe.model.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=pipe.model.device)
    target = make_target(pipe.model)
    target.prefill(ids, mask, capacity=width + k + max(sizes))
    seconds = time_calls(target, ids[:, -1:], [n - 1 + k for n in sizes])
    return {n: seconds[n - 1 + k] for n in sizes}
