"""Viterbi selection finds the best path of all, and leaves exact what is checked."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import target

import polyspec
from polyspec.drafting.multi_token import MultiTokenModel
from polyspec.drafting.viterbi import best_path, transitions

PROMPT = torch.tensor([[2, 5, 7, 9], [3, 3, 8, 4]])


def brute(log_q: torch.Tensor, log_a: torch.Tensor, last: torch.Tensor, weight: float) -> list[list[int]]:
    found = []
    for q, first in zip(log_q.tolist(), last.tolist(), strict=True):

        def score(path: tuple[int, ...], q=q, first=first) -> float:
            steps = zip((first, *path), path, strict=False)
            return sum(q[i][x] for i, x in enumerate(path)) + weight * sum(float(log_a[u, v]) for u, v in steps)

        found.append(list(max(itertools.product(range(len(q[0])), repeat=len(q)), key=score)))
    return found


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_path_is_the_best_of_all(length: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(length)
    log_q = torch.randn(6, length, 5, generator=generator).log_softmax(-1)
    log_a = (2 * torch.randn(5, 5, generator=generator)).log_softmax(-1)
    last = torch.randint(0, 5, (6,), generator=generator)
    expected = brute(log_q, log_a, last, weight)
    assert best_path(log_q, log_a, last, 5, weight).tolist() == expected
    assert best_path(log_q, log_a, last, 99, weight).tolist() == expected
    if weight == 2.0 and length > 1:
        assert best_path(log_q, log_a.T, last, 5, weight).tolist() != expected, "which follows which matters"
        alone = log_q.argmax(-1).tolist()
        assert alone != expected
    if weight == 0.0:
        assert log_q.argmax(-1).tolist() == expected


def test_one_candidate_is_each_head_by_itself() -> None:
    log_q = torch.randn(3, 4, 7).log_softmax(-1)
    assert torch.equal(best_path(log_q, torch.zeros(7, 7), torch.zeros(3, dtype=torch.long), 1), log_q.argmax(-1))


def test_transitions_are_shares_of_pairs() -> None:
    log_a = transitions([[0, 1, 2], torch.tensor([0, 1, 0])], 3, smoothing=1.0)
    assert log_a.exp()[0].tolist() == [pytest.approx(x) for x in (1 / 5, 3 / 5, 1 / 5)]
    assert log_a.exp()[1].tolist() == [pytest.approx(x) for x in (2 / 5, 1 / 5, 2 / 5)]


def heads_with_transitions() -> MultiTokenModel:
    model = target("llama")
    heads = MultiTokenModel.for_target(model, heads=3)
    heads.fit_transitions(model.generate(PROMPT, do_sample=False, max_new_tokens=40, pad_token_id=0), 1e-4)
    return heads


def test_checked_paths_give_the_models_own_tokens_and_are_kept_with_the_heads(tmp_path) -> None:
    model, heads = target("llama"), heads_with_transitions()
    heads.save_pretrained(tmp_path)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    own, rates = model.generate(PROMPT, **options), {}
    for viterbi in (None, 99):
        fast = polyspec.custom_generate("speech_mtp", heads=str(tmp_path), threshold=None, length=3, viterbi=viterbi)
        assert torch.equal(model.generate(PROMPT, **options, custom_generate=fast), own)
        rates[viterbi] = fast.stats.acceptance_rate
    assert rates[99] > rates[None], "heads that all say the same gain by knowing what follows what"


def test_a_threshold_reads_the_heads_own_probabilities() -> None:
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    for threshold, tokens in ((0.0, 4.0), (1.0, 1.0)):
        knobs = {"heads": heads_with_transitions(), "threshold": threshold, "length": 3, "viterbi": 4}
        fast = polyspec.custom_generate("speech_mtp", **knobs)
        target("llama").generate(PROMPT, **options, custom_generate=fast)
        assert fast.stats.tokens_per_call == tokens


def test_heads_without_transitions_are_refused() -> None:
    heads = MultiTokenModel.for_target(target("llama"), heads=3)
    with pytest.raises(polyspec.ConfigError, match="fit_transitions"):
        polyspec.custom_generate("speech_mtp", heads=heads, viterbi=4)
    with pytest.raises(polyspec.ConfigError, match="viterbi must be"):
        polyspec.custom_generate("speech_mtp", heads=heads_with_transitions(), viterbi=0)
