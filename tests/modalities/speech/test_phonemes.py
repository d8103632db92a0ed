"""The interleaved form: what may follow what, over drafts as prefix by prefix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Processing
from polyspec.errors import CheckpointError, InputError
from polyspec.modalities.speech.phonemes import Interleaved, Layout, new_tokenizer, pieces
from polyspec.trees import Tree
from polyspec.verification import Verdict

TOKENIZER = new_tokenizer(4, "abc ")
LAYOUT = Layout.of(TOKENIZER)
EDGE, A, B, C, SPACE = range(LAYOUT.first_phoneme, LAYOUT.first_phoneme + 5)


def allowed(said: list[int], text: str = "ab", longest: int = 3, pace: int = 8) -> set[int]:
    ids = torch.tensor([TOKENIZER(text)["input_ids"] + said])
    scores = Interleaved(LAYOUT, longest, pace)(ids, torch.zeros(1, LAYOUT.size))
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


def test_phonemes_are_said_in_order_each_followed_by_codes() -> None:
    codes = set(range(4))
    assert TOKENIZER("ab")["input_ids"] == [LAYOUT.start, EDGE, A, B, EDGE, LAYOUT.speak]
    assert allowed([]) == {EDGE}
    assert allowed([EDGE]) == codes
    assert allowed([EDGE, 0]) == codes | {A}
    assert allowed([EDGE, 0, A, 1, 2]) == codes | {B}
    assert allowed([EDGE, 0, A, 1, 2, 3]) == {B}, "three codes are the most here"
    assert allowed([EDGE, 0, A, 1, B, 1, EDGE]) == codes
    assert allowed([EDGE, 0, A, 1, B, 1, EDGE, 3]) == codes | {LAYOUT.end}


def test_speech_that_runs_on_is_hurried() -> None:
    said = [EDGE, 0, 1, A, 0, 1]
    assert allowed(said, pace=2) == {0, 1, 2, 3, B}
    assert allowed(said, pace=1) == {B}, "four phonemes, four codes: from now on one each"
    assert allowed([*said, B], pace=1) == {0, 1, 2, 3} and allowed([*said, B, 0], pace=1) == {EDGE}


class PrefixByPrefix(LogitsProcessor):
    """The same rule without its method for drafts."""

    def __init__(self, rule: Interleaved):
        self.rule = rule

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return self.rule(input_ids, scores)


def ragged() -> Sequences:
    """Three rows that are in different places of texts of different lengths."""
    inputs = TOKENIZER(["ab", "abcab", "c"], padding=True, return_tensors="pt")
    sequences = Sequences(inputs["input_ids"], 12, mask=inputs["attention_mask"])
    drafts = torch.tensor([[EDGE, 0, A, 1], [EDGE, 2, 0, 0], [EDGE, 2, 0, 0]])
    verdict = Verdict(torch.tensor([4, 2, 0]), torch.tensor([3, A, EDGE]))
    sequences.commit(drafts, verdict, torch.zeros(3, 5))
    return sequences


def legal_drafts(sequences: Sequences, length: int, generator: torch.Generator) -> Tensor:
    """Drafts drawn among what the rule allows, prefix by prefix."""
    drafts = sequences.tail(1)[:, :0]
    processing = Processing([PrefixByPrefix(Interleaved(LAYOUT, 3, 1))])
    for step in range(length):
        noise = torch.randn(3, 1, LAYOUT.size, generator=generator)
        drafts = torch.cat([drafts, processing.scores(noise, sequences, drafts, first=step).argmax(-1)], dim=1)
    return drafts


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_of_drafts_is_judged_as_prefix_by_prefix(seed: int) -> None:
    generator, sequences = torch.Generator().manual_seed(seed), ragged()
    logits, drafts = torch.randn(3, 6, LAYOUT.size, generator=generator), legal_drafts(sequences, 5, generator)
    fast, slow = (Processing([p]) for p in (Interleaved(LAYOUT, 3, 1), PrefixByPrefix(Interleaved(LAYOUT, 3, 1))))
    assert torch.equal(fast.scores(logits, sequences, drafts), slow.scores(logits, sequences, drafts))
    for first in range(5):
        part = fast.scores(logits[:, first : first + 1], sequences, drafts[:, :first], first=first)
        assert torch.equal(part, slow.scores(logits, sequences, drafts)[:, first : first + 1])


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_of_drafts_is_judged_as_prefix_by_prefix(seed: int) -> None:
    generator, sequences = torch.Generator().manual_seed(seed), ragged()
    chains = [legal_drafts(sequences, 3, generator) for _ in range(2)]
    drafts = torch.cat(chains, dim=1)
    logits = torch.randn(3, 7, LAYOUT.size, generator=generator)
    shared = torch.tensor([-1, 0, 1, -1, 3, 4])
    for parents in (shared, torch.stack([shared, torch.tensor([-1, 0, 1, 0, 3, 4]), shared])):
        if parents.dim() == 2:  # its second row hangs one chain under the other's first node
            drafts = drafts.clone()
            drafts[1, 0] = drafts[1, 3]
        fast, slow = (Processing([p]) for p in (Interleaved(LAYOUT, 3, 1), PrefixByPrefix(Interleaved(LAYOUT, 3, 1))))
        tree = Tree(parents)
        assert torch.equal(fast.scores(logits, sequences, drafts, tree), slow.scores(logits, sequences, drafts, tree))
        level = fast.scores(logits[:, 4:], sequences, drafts, tree, first=4)
        assert torch.equal(level, slow.scores(logits, sequences, drafts, tree)[:, 4:])


def test_other_tokenizers_are_refused() -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 0, "<1>": 1}

    with pytest.raises(CheckpointError, match="no speech codes"):
        Layout.of(Other())


def test_long_text_is_cut_at_sentences_clauses_and_words_and_nothing_is_lost() -> None:
    pytest.importorskip("hibari")
    from polyspec.modalities.speech.phonemes import alphabet, phonemiser

    text = "The cat sat on the mat, and the dog looked at it for a very long time because it was there. " * 120
    assert len(text) > 10_000
    found = pieces(text, set(alphabet()))
    assert max(map(len, found)) <= 90 and len(found) >= 120
    assert "".join(found).replace(" ", "") == "".join(phonemiser().phonemize(text)).replace(" ", "")
    for nothing in ("***", "...", "\u3042\u3044"):
        with pytest.raises(InputError, match="can be spoken"):
            pieces(nothing, set(alphabet()))
