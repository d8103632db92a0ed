"""Retrieval from a datastore."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, target

import polyspec
from polyspec.drafting.rest import Datastore, trie

PROMPT = torch.tensor([[5, 9, 3, 7]])


def generate(datastore: object, **knobs: object) -> tuple[torch.Tensor, polyspec.DecodingStats]:
    fast = polyspec.custom_generate("rest", datastore=datastore, length=6, **knobs)
    out = target("llama").generate(PROMPT, do_sample=False, max_new_tokens=24, custom_generate=fast)
    return out, fast.stats


def test_a_datastore_of_the_targets_own_output_is_accepted_throughout(tmp_path: Path) -> None:
    plain = target("llama").generate(PROMPT, do_sample=False, max_new_tokens=24)
    store = Datastore.from_tokens([[2, 3], plain[0].tolist()])
    store.save(tmp_path / "store.safetensors")
    for given in (store, tmp_path / "store.safetensors", [plain[0].tolist()]):
        out, stats = generate(given)
        assert torch.equal(out, plain)
        assert stats.tokens_per_call > 4


def test_other_texts_do_not_change_greedy_output() -> None:
    texts = torch.randint(2, VOCAB, (20, 30)).tolist()
    plain = target("llama").generate(PROMPT, do_sample=False, max_new_tokens=24)
    assert torch.equal(generate(texts, shortest=1)[0], plain)


def test_every_occurrence_of_a_suffix_is_found() -> None:
    text = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    store = Datastore.from_tokens([text[:200], text[200:]])
    laid = store.tokens.tolist()
    for pattern in ([1], [2, 3], text[50:57], text[193:200], [3, 3, 3, 3, 3, 3, 3, 3]):
        expected = [i + len(pattern) for i in range(len(laid)) if laid[i : i + len(pattern)] == pattern]
        assert sorted(store.occurrences(pattern).tolist()) == expected


def test_the_longest_suffix_is_matched_and_nothing_crosses_a_texts_end() -> None:
    store = Datastore.from_tokens([[1, 2, 3, 9], [7, 3, 8, 8]])

    def drafted(context: list[int], shortest: int = 1) -> list[int]:
        return trie(store.continuations(context, 4, longest=16, shortest=shortest), nodes=9)[0]

    assert drafted([1, 2, 3]) == [9]
    assert drafted([7, 3]) == [8, 8]
    assert drafted([5, 9]) == []
    assert drafted([7, 3], shortest=3) == []


def test_the_tree_holds_the_most_frequent_continuations() -> None:
    followed = np.array([[1, 5, 5], [1, 6, 7], [1, 6, 8], [2, 9, 9], [1, 6, 8]], dtype=np.uint32)
    assert trie(followed, 3) == ([1, 6, 8], [-1, 0, 1])
    tokens, parents = trie(followed, 5)
    assert (tokens, parents) == ([1, 2, 5, 6, 8], [-1, -1, 0, 0, 3])
    tokens, parents = trie(followed, 99)
    assert len(tokens) == 9
    assert all(parent < node for node, parent in enumerate(parents))


def test_rows_with_different_matches_share_one_batch() -> None:
    ids = torch.tensor([[5, 9, 3, 7], [8, 8, 2, 4], [1, 6, 6, 6]])
    knobs = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    plain = target("llama").generate(ids, **knobs)
    fast = polyspec.custom_generate("rest", datastore=[plain[1].tolist(), [6, 6, 3]], length=6)
    assert torch.equal(target("llama").generate(ids, **knobs, custom_generate=fast), plain)
    assert fast.stats.accepted_tokens > 10


def test_bad_datastores_are_named(tmp_path: Path) -> None:
    with pytest.raises(polyspec.InputError, match="from_texts"):
        generate(["some text"])
    with pytest.raises(polyspec.InputError, match="empty"):
        generate([[], []])
    with pytest.raises(polyspec.InputError, match="tokenizer"):
        generate([[1, VOCAB]])
    with pytest.raises(polyspec.CheckpointError):
        generate(tmp_path / "nowhere.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(polyspec.CheckpointError):
        generate(str(tmp_path / "broken.safetensors"))
    with pytest.raises(polyspec.ConfigError):
        generate([[1, 2]], longest=2, shortest=3)
