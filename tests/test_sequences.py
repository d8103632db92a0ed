"""Committing a round: how many tokens each row gains, when it ends, and what its surroundings are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyspec import InputError
from polyspec.decoding.sequences import Sequences
from polyspec.verification import Verdict

PROMPT = torch.tensor([[0, 0, 5], [6, 7, 8]])
MASK = torch.tensor([[0, 0, 1], [1, 1, 1]])
EOS = 1


def sequences(max_new: int = 6, **options: Any) -> Sequences:
    return Sequences(PROMPT, max_new, mask=MASK, eos=torch.tensor([EOS]), pad=0, **options)


def commit(
    s: Sequences, drafted: list[list[int]], accepted: list[int], following: list[int], best: Tensor | None = None
) -> list[int]:
    tokens = torch.tensor(drafted)
    verdict = Verdict(torch.tensor(accepted), torch.tensor(following))
    return s.commit(tokens, verdict, torch.zeros(2, tokens.shape[1] + 1) if best is None else best)


def test_a_row_gains_its_accepted_drafts_and_the_next_token() -> None:
    s = sequences()
    assert commit(s, [[11, 12, 13], [21, 22, 23]], [2, 0], [31, 41]) == [3, 1]
    assert s.result().tolist() == [[0, 0, 5, 11, 12, 31], [6, 7, 8, 41, 0, 0]]
    assert s.history == [[5, 11, 12, 31], [6, 7, 8, 41]]
    assert s.cached == [3, 3]
    assert s.tail(2).tolist() == [[12, 31], [8, 41]]
    assert s.positions(2).tolist() == [[4, 5], [4, 5]]


def test_a_row_ends_at_its_first_end_of_sequence_even_among_accepted_drafts() -> None:
    s = sequences()
    assert commit(s, [[11, EOS, 13], [21, 22, EOS]], [3, 1], [31, 41]) == [2, 2]
    assert s.running == [False, True]
    assert commit(s, [[14, 15, 16], [24, 25, 26]], [3, 1], [32, 42]) == [0, 2]
    assert s.result().tolist() == [[0, 0, 5, 11, EOS, 0, 0], [6, 7, 8, 21, 41, 24, 42]]
    assert s.history[0] == [5, 11, EOS]


def test_no_row_grows_beyond_the_limit() -> None:
    s = sequences(max_new=3)
    assert commit(s, [[11, 12, 13, 14], [21, 22, 23, 24]], [4, 1], [31, 41]) == [3, 2]
    assert s.running == [False, True]
    assert s.remaining == 1
    assert commit(s, [[0, 0], [25, 26]], [2, 2], [32, 42]) == [0, 1]
    assert s.finished
    assert s.result().tolist() == [[0, 0, 5, 11, 12, 13], [6, 7, 8, 21, 41, 25]]


def test_a_stopping_criterion_cuts_a_row_where_it_first_holds() -> None:
    asked: list[int] = []

    def stop(ids: Tensor, scores: None) -> Tensor:
        asked.append(ids.shape[1])
        return ids[:, -1] == 12

    s = sequences(stops=[stop])
    assert commit(s, [[11, 12, 13], [21, 22, 23]], [3, 2], [31, 41]) == [2, 3]
    assert s.running == [False, True]
    assert s.result().tolist() == [[0, 0, 5, 11, 12, 0], [6, 7, 8, 21, 22, 41]]
    assert s.history[0] == [5, 11, 12]
    assert asked == [4, 5, 4, 5, 6]


def test_tokens_are_emitted_once_all_running_rows_have_them() -> None:
    emitted: list[list[int]] = []
    s = sequences(emit=lambda column: emitted.append(column.tolist()))
    commit(s, [[11, 12], [21, 22]], [2, 0], [31, 41])
    assert emitted == [[11, 41]]
    commit(s, [[13, 14], [23, 24]], [0, 2], [32, 42])
    assert emitted == [[11, 41], [12, 23], [31, 24], [32, 42]]
    commit(s, [[EOS, 0], [25, 26]], [1, 0], [33, 43])
    commit(s, [[0, 0], [27, 28]], [0, 2], [34, 44])
    assert emitted[4:] == [[EOS, 43], [0, 27]]
    assert s.finished


def test_prefixes_are_grouped_by_length_and_right_for_their_rows() -> None:
    s = sequences()
    commit(s, [[11, 12], [21, 22]], [2, 0], [31, 41])
    drafted = torch.tensor([[14], [24]])
    found = {rows.tolist()[0]: tokens[rows].tolist() for rows, tokens in s.prefixes(drafted)}
    assert found == {1: [[6, 7, 8, 41, 24]], 0: [[0, 0, 5, 11, 12, 31, 14]]}


@pytest.mark.parametrize("sick", [float("nan"), float("-inf")])
def test_a_committed_token_without_a_distribution_is_an_error_and_a_rejected_one_is_not(sick: float) -> None:
    best = torch.zeros(2, 3)
    best[1, 2] = sick
    commit(sequences(), [[11, 12], [21, 22]], [2, 1], [31, 41], best)
    with pytest.raises(InputError, match="row 1"):
        commit(sequences(), [[11, 12], [21, 22]], [1, 2], [31, 41], best)


def test_a_token_that_could_not_be_drawn_is_an_error() -> None:
    with pytest.raises(InputError, match="row 0"):
        commit(sequences(), [[11, 12], [21, 22]], [1, 1], [-1, 41])
