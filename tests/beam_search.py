"""What beam search must find, computed one sequence at a time without a cache, and a way to run the loop on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tiny_models import VOCAB
from transformers import PreTrainedModel

from polyspec.decoding.beam import Beam, BeamContext
from polyspec.decoding.search import Ranking, Search, pack
from polyspec.drafting.base import NoDraft
from polyspec.metrics import DecodingStats
from polyspec.target import make_target
from polyspec.trie import Trie
from polyspec.verification import strict_topk

CODES = 12
Found = list[tuple[tuple[int, ...], float]]
"""Sequences and scores, best first."""


def catalogue(count: int = 60, depth: int = 4, codes: int = CODES, seed: int = 0) -> np.ndarray:
    """Item tokens `[count, depth]`: every level has tokens of its own, all below VOCAB; some items may be the same."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(2 + codes * d, 2 + codes * (d + 1), count) for d in range(depth)], axis=1)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, n).tolist() for n in lengths]


@torch.no_grad()
def log_probs(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1)


def exhaustive(model: PreTrainedModel, prompt: list[int], items: np.ndarray) -> Found:
    """Every item and its log-probability, best first."""
    found = []
    for item in {tuple(i) for i in items.tolist()}:
        log_p = log_probs(model, [*prompt, *item])[len(prompt) - 1 : -1]
        found.append((item, float(log_p.gather(1, torch.tensor(item)[:, None]).sum())))
    return sorted(found, key=lambda f: -f[1])


def beam_search(model: PreTrainedModel, prompt: list[int], items: np.ndarray, k: int) -> Found:
    """Beam search by its definition, over a set of prefixes."""
    prefixes = {tuple(i[:n]) for i in items.tolist() for n in range(len(i) + 1)}
    beams: Found = [((), 0.0)]
    for _ in range(items.shape[1]):
        grown = []
        for prefix, score in beams:
            log_p = log_probs(model, [*prompt, *prefix])[-1]
            grown += [((*prefix, t), score + float(log_p[t])) for t in range(VOCAB) if (*prefix, t) in prefixes]
        beams = sorted(grown, key=lambda b: -b[1])[:k]
    return beams


def run(
    model: PreTrainedModel,
    texts: list[list[int]],
    items: np.ndarray,
    k: Sequence[int],
    drafter: Any = None,
    *,
    rule: Callable[..., Any] = strict_topk,
    levels: int | None = None,
    ranking: Ranking | None = None,
    allowed: torch.Tensor | None = None,
    seed: int = 0,
) -> tuple[list[Found], DecodingStats]:
    """What the loop finds for each prompt; without a drafter plain beam search. allowed `[B, items]` bool."""
    trie = Trie.build(items)
    packed, lengths = pack(texts)
    search = Search(
        trie,
        packed,
        lengths,
        list(k),
        **({} if ranking is None else {"ranking": ranking}),
        alive=None if allowed is None else trie.alive(allowed),
        generator=torch.Generator().manual_seed(seed),
    )
    loop = Beam(rule, (0 if drafter is None else 8) if levels is None else levels)
    target, drafter, stats = make_target(model), NoDraft() if drafter is None else drafter, DecodingStats()
    loop.check(target, drafter)
    with torch.no_grad():
        loop.run(BeamContext(target, search, stats), drafter)
    spelt = {leaf: tuple(item) for leaf, item in zip(trie.leaf.tolist(), items.tolist(), strict=True)}
    rows = zip(search.found.node.tolist(), search.found.score.tolist(), strict=True)
    return [[(spelt[n], s) for n, s in zip(*row, strict=True) if n] for row in rows], stats


def same(one: list[Found], other: list[Found], tolerance: float = 1e-4) -> bool:
    """The same sequences in the same order, with scores that differ by no more than `tolerance`."""
    return all(
        [s for s, _ in a] == [s for s, _ in b]
        and all(abs(x - y) <= tolerance for (_, x), (_, y) in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    )
