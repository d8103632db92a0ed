"""Nothing that is as large as the vocabulary times the sequence is ever alive during a run."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from recipe_needs import by_name, overrides, text_recipes
from tiny_models import llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import polyspec
from polyspec.cache import RaggedCache
from polyspec.recipe import Recipe

VOCAB, PROMPT, NEW, BATCH = 1009, 40, 48, 2
PER_ROUND = 24  # more tokens than any recipe here scores in a round, fewer than the prompt and the generated sequence


class Largest(TorchDispatchMode):
    """Records the most elements, per row and vocabulary entry, of any tensor that has the vocabulary as a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0.0
        self.where = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.shape and VOCAB in leaf.shape and leaf._base is None:
                tokens = leaf.numel() / VOCAB / BATCH
                if tokens > self.tokens and leaf.shape != (VOCAB, 32):
                    self.tokens, self.where = tokens, f"{func} -> {list(leaf.shape)}"
        return out


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@by_name(text_recipes())
def test_no_tensor_of_vocabulary_times_sequence_is_made(recipe: Recipe, do_sample: bool) -> None:
    torch.manual_seed(0)
    model = llama(vocab=VOCAB).eval()
    ids = torch.randint(2, VOCAB, (BATCH, PROMPT))
    fast = polyspec.custom_generate(recipe.name, seed=0, **overrides(recipe, model, nodes=8))
    with Largest() as largest:
        model.generate(
            ids,
            do_sample=do_sample,
            temperature=0.9 if do_sample else None,
            top_p=0.9 if do_sample else None,
            top_k=None,
            max_new_tokens=NEW,
            eos_token_id=None,
            custom_generate=fast,
        )
    assert fast.stats.new_tokens == BATCH * NEW
    assert 0 < largest.tokens <= PER_ROUND, largest.where


def test_the_watch_sees_what_it_watches_for() -> None:
    with Largest() as largest:
        torch.zeros(BATCH, PROMPT, VOCAB)
    assert largest.tokens == PROMPT


def test_a_finished_run_keeps_no_cache_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[RaggedCache]] = []
    original = RaggedCache.__init__

    def counted(self: RaggedCache, *args: Any) -> None:
        made.append(weakref.ref(self))
        original(self, *args)

    monkeypatch.setattr(RaggedCache, "__init__", counted)
    model, drafter = llama().eval(), llama(layers=1).eval()
    fast = polyspec.custom_generate("speculative_sampling", draft_model=drafter, length="auto")
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, custom_generate=fast)
    gc.collect()
    assert made
    assert not [cache for cache in made if cache() is not None]
