"""Frames drawn with drafts have the plain loop's distribution: codes one by one (CSM), and whole columns (Higgs Audio)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency
from tiny_frames import noisy, tiny_csm, tiny_higgs
from torch import Tensor

import polyspec
from polyspec.decoding import chain
from polyspec.verification import Verdict

THRESHOLD = 1e-6
ROWS, RUNS = 1000, 6
KINDS = {"csm": lambda: tiny_csm(2, 4), "higgs": lambda: tiny_higgs(2, 2)}


def drawn(kind: str, recipe: str, seed: int, **knobs: Any) -> Counter[tuple[int, ...]]:
    """How often what was said of the second and third frame of at most four."""
    target = KINDS[kind]()
    knobs |= {} if recipe == "autoregressive" else {"draft_model": noisy(target[0], 1.0)}
    p = polyspec.pipeline("speech", target=target, recipe=recipe, overrides=knobs)
    p.speech.most = 4
    found: Counter[tuple[int, ...]] = Counter()
    for run in range(RUNS):
        first = seed + run * ROWS
        said, stats = p.tokens(["ab"] * ROWS, list(range(first, first + ROWS)), None, do_sample=True, temperature=1.0)
        assert recipe == "autoregressive" or 0.01 < stats.acceptance_rate < 0.98
        found.update(tuple(row[2:6]) for row in said)
    return found


def fit(kind: str, recipe: str) -> float:
    """The p-value of both having one distribution; rare utterances are counted together."""
    plain, other = drawn(kind, "autoregressive", 0), drawn(kind, recipe, 10**6, length=3)
    often = [u for u in plain | other if plain[u] + other[u] >= 20]
    counts = [[c[u] for u in often] + [c.total() - sum(c[u] for u in often)] for c in (plain, other)]
    assert len(often) > 10
    table = torch.tensor(counts)
    return float(chi2_contingency(table[:, table.sum(0) > 0].numpy()).pvalue)


@pytest.mark.parametrize("recipe", ["speculative_sampling", "block_verification"])
@pytest.mark.parametrize("kind", KINDS)
def test_frames_have_the_plain_loops_distribution(kind: str, recipe: str) -> None:
    assert fit(kind, recipe) > THRESHOLD


def rest_of_the_draft(
    tokens: Tensor, verdict: Verdict, scores: Tensor, positions: Tensor, draws: Any, step: int
) -> tuple[Tensor, Verdict]:
    """Keeps what was drafted last in a column, behind the rejected code."""
    own, full = chain_to_the_step(tokens, verdict, scores, positions, draws, step)
    drafted = tokens.shape[1] - step + 1
    last = tokens.gather(1, full.accepted.clamp(max=tokens.shape[1] - 1)[:, None])[:, 0]
    keep = (full.accepted < drafted) & (verdict.accepted < full.accepted)
    return own, Verdict(full.accepted, torch.where(keep, last, full.next_token))


chain_to_the_step = chain.to_the_step


def test_a_column_completed_from_the_draft_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "to_the_step", rest_of_the_draft)
    assert fit("higgs", "speculative_sampling") < THRESHOLD
