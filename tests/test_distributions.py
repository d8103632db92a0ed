"""Scores over drafted prefixes are what transformers' processors give for each prefix on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from polyspec import ConfigError
from polyspec.decoding.sequences import Sequences
from polyspec.distributions import (
    Coupled,
    Greedy,
    Independent,
    Processing,
    SharedNoise,
    fit_vocabulary,
    is_history_free,
    row_seeds,
)
from polyspec.trees import Tree
from polyspec.verification import Verdict, gumbel_noise

VOCAB = 23
CPU = torch.device("cpu")

PROCESSORS: dict[str, list[LogitsProcessor]] = {
    "nothing": [],
    "warpers": [hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(9), hf.TopPLogitsWarper(0.8), hf.MinPLogitsWarper(0.05)],
    "typical": [hf.TypicalLogitsWarper(0.7), hf.EpsilonLogitsWarper(0.01), hf.EtaLogitsWarper(0.01, device="cpu")],
    "suppress": [hf.SuppressTokensLogitsProcessor([3, 4]), hf.InfNanRemoveLogitsProcessor(), hf.LogitNormalization()],
    "history": [hf.RepetitionPenaltyLogitsProcessor(1.5), hf.NoRepeatNGramLogitsProcessor(2), hf.TopKLogitsWarper(7)],
    "length": [
        hf.MinNewTokensLengthLogitsProcessor(4, 6, 1, device="cpu"),
        hf.ForcedEOSTokenLogitsProcessor(9, 1, device="cpu"),
    ],
    "between": [hf.TopKLogitsWarper(12), hf.RepetitionPenaltyLogitsProcessor(2.0), hf.TemperatureLogitsWarper(1.7)],
}


def ragged() -> Sequences:
    """Three rows, of which two have come further than the third."""
    generator = torch.Generator().manual_seed(0)
    s = Sequences(torch.randint(2, VOCAB, (3, 4), generator=generator), 12, pad=0)
    drafted = torch.randint(2, VOCAB, (3, 3), generator=generator)
    s.commit(drafted, Verdict(torch.tensor([3, 0, 2]), torch.tensor([5, 6, 7])), torch.zeros(3, 4))
    return s


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_drafted_position_is_processed_with_its_own_prefix(name: str) -> None:
    s, processors = ragged(), PROCESSORS[name]
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 5, VOCAB, generator=generator)
    drafts = torch.randint(2, VOCAB, (3, 4), generator=generator)
    given = logits.clone()
    scores = Processing(LogitsProcessorList(processors)).scores(logits, s, drafts)
    for row in range(3):
        for column in range(5):
            prefix = torch.cat([s.tokens[row, : s.lengths[row]], drafts[row, :column]])
            expected = LogitsProcessorList(processors)(prefix[None], given[row, column][None].clone())
            torch.testing.assert_close(scores[row, column], expected[0])
    assert torch.equal(logits, given), "logits belong to the caller"


def test_a_tree_node_is_processed_with_the_path_that_leads_to_it() -> None:
    s, processors = ragged(), PROCESSORS["history"]
    generator = torch.Generator().manual_seed(2)
    parents = [-1, -1, 0, 1, 2]
    drafts = torch.randint(2, VOCAB, (3, 5), generator=generator)
    logits = torch.randn(3, 6, VOCAB, generator=generator)
    scores = Processing(processors).scores(logits, s, drafts, Tree(torch.tensor(parents)))
    paths = [[], [0], [1], [0, 2], [1, 3], [0, 2, 4]]
    for row in range(3):
        for node, path in enumerate(paths):
            prefix = torch.cat([s.tokens[row, : s.lengths[row]], drafts[row, path]])
            expected = LogitsProcessorList(processors)(prefix[None], logits[row, node][None].clone())
            torch.testing.assert_close(scores[row, node], expected[0])


def test_a_processor_of_ones_own_is_asked_once_if_it_says_that_history_does_not_matter() -> None:
    class Asked(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            return scores

    free, bound = Asked(), Asked()
    free.history_free = True  # type: ignore[attr-defined]
    assert is_history_free(free) and not is_history_free(bound)
    s = ragged()
    Processing([free, bound]).scores(torch.randn(3, 4, VOCAB), s, torch.randint(2, VOCAB, (3, 3)))
    assert free.calls == 1
    assert bound.calls == 4 * len(set(s.lengths))


def test_float16_logits_are_processed_in_float32() -> None:
    scores = Processing([hf.TemperatureLogitsWarper(0.01)]).scores(
        torch.full((3, 1, VOCAB), 60000.0, dtype=torch.float16), ragged(), torch.empty(3, 0, dtype=torch.long)
    )
    assert scores.dtype == torch.float32 and bool(scores.isfinite().all())


def test_padded_vocabularies_are_cut_or_filled_with_what_is_never_drawn() -> None:
    scores = torch.randn(2, 3, 7)
    assert torch.equal(fit_vocabulary(scores, 7), scores)
    assert torch.equal(fit_vocabulary(scores, 5), scores[..., :5])
    filled = fit_vocabulary(scores, 9)
    assert torch.equal(filled[..., :7], scores) and bool((filled[..., 7:] == float("-inf")).all())


def test_seeds_are_one_a_row() -> None:
    assert row_seeds(5, 3, CPU).tolist() == [5, 6, 7]
    assert row_seeds([3, 1, 3], 3, CPU).tolist() == [3, 1, 3]
    torch.manual_seed(4)
    first = row_seeds(None, 3, CPU)
    assert len(set(first.tolist())) == 3
    assert not torch.equal(row_seeds(None, 3, CPU), first)
    for bad in ([1, 2], 1.5, "1", [1, 2, 2**70], [1, 2, None]):
        with pytest.raises(ConfigError, match="seed"):
            row_seeds(bad, 3, CPU)  # type: ignore[arg-type]


def positions(rows: int, width: int) -> Tensor:
    return torch.arange(width).expand(rows, -1)


def test_coupled_draws_do_not_depend_on_how_rounds_are_cut() -> None:
    scores = torch.randn(4, 6, VOCAB, generator=torch.Generator().manual_seed(0))
    draws = Coupled(torch.arange(4) + 10)
    whole = draws.draw(scores, positions(4, 6))
    for start, end in ((0, 1), (1, 4), (4, 6)):
        assert torch.equal(draws.draw(scores[:, start:end], positions(4, 6)[:, start:end]), whole[:, start:end])
    alone = Coupled(torch.tensor([12])).draw(scores[2:3], positions(1, 6))
    assert torch.equal(alone[0], whole[2])


def test_draws_never_pick_what_is_ruled_out() -> None:
    scores = torch.randn(64, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    scores[..., ::2] = float("-inf")
    for draws in (Greedy(), Coupled(torch.arange(64)), Independent(torch.Generator().manual_seed(0), torch.arange(64))):
        assert bool((draws.draw(scores, positions(64, 3)) % 2 == 1).all())


def test_remembered_noise_is_the_noise_whatever_was_asked_for_before() -> None:
    seeds = torch.tensor([3, 3, 8])
    noise, generator = SharedNoise(seeds), torch.Generator().manual_seed(0)
    start = torch.tensor([[0], [5], [2]])
    for round_ in range(60):
        width = int(torch.randint(0, 6, (), generator=generator))
        positions = start + torch.arange(width)
        if round_ % 5 == 0:  # a tree: siblings share a position
            positions = start + torch.tensor([0, 1, 1, 2, 2, 2])
        if round_ % 7 == 0:  # positions far apart
            positions = start + torch.tensor([0, 1, 100])
        vocab = 9 if round_ < 50 else 13
        drawn = noise(positions, vocab)
        assert torch.equal(drawn, gumbel_noise(seeds, positions, vocab))
        drawn.zero_()  # the caller may work in place
        start = start + torch.randint(0, 4, (3, 1), generator=generator)
