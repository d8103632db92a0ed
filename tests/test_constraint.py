"""Constraints by position: the same for every way of scoring drafts, and before any processor."""

from __future__ import annotations

import torch
from transformers import TopKLogitsWarper

from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Constraint, Processing
from polyspec.trees import Tree
from polyspec.verification import Verdict

VOCAB = 5
EVEN, ODD, LAST = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
CONSTRAINT = Constraint(torch.stack([EVEN, ODD, LAST]), torch.tensor([0, 1, 0, 2]))


def ragged() -> Sequences:
    """Two rows that have gained 1 and 2 tokens."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    sequences = Sequences(torch.zeros(2, 3, dtype=torch.long), 6, mask=mask)
    drafts, accepted, token = torch.tensor([[0, 0], [2, 0]]), torch.tensor([0, 1]), torch.tensor([2, 1])
    sequences.commit(drafts, Verdict(accepted, token), torch.zeros(2, 3))
    assert sequences.lengths == [4, 5]
    return sequences


def allowed(scores: torch.Tensor) -> torch.Tensor:
    return scores.isfinite()


def test_a_chain_of_drafts_is_held_to_where_each_row_is() -> None:
    logits, none = torch.randn(2, 4, VOCAB), torch.zeros(2, 0, dtype=torch.long)
    scores = Processing([], CONSTRAINT).scores(logits, ragged(), none)
    assert torch.equal(allowed(scores)[0], torch.stack([ODD, EVEN, LAST, LAST]))
    assert torch.equal(allowed(scores)[1], torch.stack([EVEN, LAST, LAST, LAST]))
    assert torch.equal(scores[allowed(scores)], logits[allowed(scores)])
    one = Processing([], CONSTRAINT).scores(logits[:, 1:2], ragged(), none, first=1)
    assert torch.equal(one, scores[:, 1:2])


def test_siblings_in_a_tree_stand_at_one_place() -> None:
    logits, drafts = torch.randn(2, 4, VOCAB), torch.zeros(2, 3, dtype=torch.long)
    for parents in (torch.tensor([-1, -1, 0]), torch.tensor([[-1, -1, 0], [-1, -1, 0]])):
        scores = Processing([], CONSTRAINT).scores(logits, ragged(), drafts, Tree(parents))
        assert torch.equal(allowed(scores)[0], torch.stack([ODD, EVEN, EVEN, LAST]))
        level = Processing([], CONSTRAINT).scores(logits[:, 3:], ragged(), drafts, Tree(parents), first=3)
        assert torch.equal(level, scores[:, 3:])


def test_the_most_likely_tokens_are_chosen_among_those_allowed() -> None:
    logits = torch.tensor([3.0, 5.0, 2.0, 4.0, 9.0]).expand(2, 1, VOCAB)
    processing = Processing([TopKLogitsWarper(1)], CONSTRAINT)
    assert processing.history_free
    scores = processing.scores(logits, ragged(), torch.zeros(2, 0, dtype=torch.long))
    assert allowed(scores)[:, 0].nonzero()[:, 1].tolist() == [1, 0]
