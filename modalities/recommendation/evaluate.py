"""How good lists are: Recall@K and NDCG@K, and popularity to stand beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from math import log2

from polyspec.errors import InputError


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
