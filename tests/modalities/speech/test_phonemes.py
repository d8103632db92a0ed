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

TOKENIZER = new_tokenizer(4, "abc ", durations=3)
LAYOUT = Layout.of(TOKENIZER)
EDGE, A, B, C, SPACE = range(LAYOUT.first_phoneme, LAYOUT.first_phoneme + 5)


def spoken(phoneme: int, codes: int) -> int:
    """The token of a phoneme (as in the prompt) that lasts `codes` codes."""
    return TOKENIZER.get_vocab()[f"{TOKENIZER.convert_ids_to_tokens(phoneme)}:{codes}"]


def allowed(said: list[int], text: str = "ab") -> set[int]:
    ids = torch.tensor([TOKENIZER(text)["input_ids"] + said])
    scores = Interleaved(LAYOUT)(ids, torch.zeros(1, LAYOUT.size))
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


def lasting(phoneme: int) -> set[int]:
    return {spoken(phoneme, d) for d in (1, 2, 3)}


def test_phonemes_are_said_in_order_each_followed_by_its_codes() -> None:
    codes = set(range(4))
    assert TOKENIZER("ab")["input_ids"] == [LAYOUT.start, EDGE, A, B, EDGE, LAYOUT.speak]
    assert allowed([]) == lasting(EDGE)
    said = [spoken(EDGE, 1)]
    assert allowed(said) == codes
    assert allowed([*said, 0]) == lasting(A)
    said += [0, spoken(A, 3)]
    for _ in range(3):
        assert allowed(said) == codes
        said.append(2)
    assert allowed(said) == lasting(B)
    assert allowed([*said, spoken(B, 1), 1, spoken(EDGE, 2), 3]) == codes
    assert allowed([*said, spoken(B, 1), 1, spoken(EDGE, 2), 3, 0]) == {LAYOUT.end}


def test_the_layout_is_read_off_the_tokenizer() -> None:
    assert (LAYOUT.codes, LAYOUT.phonemes, LAYOUT.durations, LAYOUT.size) == (4, 5, 3, len(TOKENIZER))
    tokens = torch.tensor([spoken(p, d) for p in (EDGE, C) for d in (1, 2, 3)])
    assert LAYOUT.duration(tokens).tolist() == [1, 2, 3, 1, 2, 3]


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
    edge, a = spoken(EDGE, 1), spoken(A, 3)
    drafts = torch.tensor([[edge, 0, a, 1], [edge, 2, 0, 0], [edge, 2, 0, 0]])
    verdict = Verdict(torch.tensor([4, 2, 0]), torch.tensor([3, spoken(A, 2), spoken(EDGE, 3)]))
    sequences.commit(drafts, verdict, torch.zeros(3, 5))
    return sequences


def legal_drafts(sequences: Sequences, length: int, generator: torch.Generator) -> Tensor:
    """Drafts drawn among what the rule allows, prefix by prefix."""
    drafts = sequences.tail(1)[:, :0]
    processing = Processing([PrefixByPrefix(Interleaved(LAYOUT))])
    for step in range(length):
        noise = torch.randn(3, 1, LAYOUT.size, generator=generator)
        drafts = torch.cat([drafts, processing.scores(noise, sequences, drafts, first=step).argmax(-1)], dim=1)
    return drafts


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_of_drafts_is_judged_as_prefix_by_prefix(seed: int) -> None:
    generator, sequences = torch.Generator().manual_seed(seed), ragged()
    logits, drafts = torch.randn(3, 6, LAYOUT.size, generator=generator), legal_drafts(sequences, 5, generator)
    fast, slow = (Processing([p]) for p in (Interleaved(LAYOUT), PrefixByPrefix(Interleaved(LAYOUT))))
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
        fast, slow = (Processing([p]) for p in (Interleaved(LAYOUT), PrefixByPrefix(Interleaved(LAYOUT))))
        tree = Tree(parents)
        assert torch.equal(fast.scores(logits, sequences, drafts, tree), slow.scores(logits, sequences, drafts, tree))
        level = fast.scores(logits[:, 4:], sequences, drafts, tree, first=4)
        assert torch.equal(level, slow.scores(logits, sequences, drafts, tree)[:, 4:])


def test_a_processor_that_has_seen_one_round_follows_the_next() -> None:
    form, sequences = Interleaved(LAYOUT), ragged()
    logits, none = torch.zeros(3, 1, LAYOUT.size), sequences.tail(1)[:, :0]
    Processing([form]).scores(logits, sequences, none)
    sequences.commit(none, Verdict(torch.zeros(3, dtype=torch.long), torch.tensor([1, 2, 3])), torch.zeros(3, 1))
    fresh = Processing([Interleaved(LAYOUT)])
    assert torch.equal(Processing([form]).scores(logits, sequences, none), fresh.scores(logits, sequences, none))
    other = ragged()  # one voice may read several texts by turns
    assert torch.equal(
        Processing([form]).scores(logits, other, none),
        Processing([Interleaved(LAYOUT)]).scores(logits, other, none),
    )
    assert torch.equal(Processing([form]).scores(logits, sequences, none), fresh.scores(logits, sequences, none))


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
