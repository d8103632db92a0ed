"""The ragged cache against a reference that keeps each row's tokens in a list."""

from __future__ import annotations

import pytest
import torch
from tiny_models import target
from torch import Tensor
from transformers import DynamicCache

from polyspec import InputError, UnsupportedModelError
from polyspec.cache import RaggedCache

HEADS, DIM = 2, 3


def states(rows: int, new: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    keys = torch.randn(rows, HEADS, new, DIM, generator=generator)
    return keys, keys * 2


def kept(cache: RaggedCache, row: int, layer: int = 0) -> Tensor:
    """The row's kept keys `[L, H, D]`."""
    return cache.layers[layer].keys[row, :, : cache.lengths[row]].transpose(0, 1)


@pytest.mark.parametrize("capacity", [4, 300])
def test_rows_keep_what_they_accepted_and_nothing_else(capacity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = RaggedCache(3, capacity)
    reference: list[list[Tensor]] = [[], [], []]
    for round_ in range(40):
        new = int(torch.randint(1, 9, (1,), generator=generator))
        keys, values = states(3, new, generator)
        accepted = [new] * 3 if round_ < 2 else torch.randint(0, new + 1, (3,), generator=generator).tolist()
        for layer in range(2):
            seen_keys, seen_values = cache.update(keys + layer, values + layer, layer)
            for row in range(3):
                before = len(reference[row])
                assert torch.equal(seen_keys[row, :, before : before + new], keys[row] + layer)
                assert torch.equal(seen_values[row, :, before : before + new], values[row] + layer)
                for index, token in enumerate(reference[row]):
                    assert torch.equal(seen_keys[row, :, index], token + layer)
        for row in range(3):
            reference[row] += list(keys[row, :, : accepted[row]].transpose(0, 1))
        cache.rollback([len(r) for r in reference])
        assert cache.longest == max(map(len, reference))
        assert cache.uniform == (len({len(r) for r in reference}) == 1)
    for row in range(3):
        assert torch.equal(kept(cache, row), torch.stack(reference[row]))


def test_a_buffer_that_is_too_small_grows_and_keeps_its_content() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = RaggedCache(2, 2)
    first, _ = states(2, 2, generator)
    cache.update(first, first, 0)
    cache.rollback([2, 1])
    second, _ = states(2, 700, generator)
    cache.update(second, second, 0)
    cache.rollback([702, 701])
    assert torch.equal(kept(cache, 0), torch.cat([first[0], second[0]], 1).transpose(0, 1))
    assert torch.equal(kept(cache, 1), torch.cat([first[1, :, :1], second[1]], 1).transpose(0, 1))


def test_a_path_of_tree_nodes_moves_behind_the_kept_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = RaggedCache(2, 16)
    first, _ = states(2, 3, generator)
    cache.update(first, first, 0)
    cache.rollback([3, 1])
    nodes, _ = states(2, 6, generator)
    cache.update(nodes, nodes * 2, 0)
    cache.keep_path(torch.tensor([[0, 2, 5], [0, 3, 0]]))
    cache.rollback([6, 3])
    assert torch.equal(kept(cache, 0)[3:], nodes[0].transpose(0, 1)[[0, 2, 5]])
    assert torch.equal(kept(cache, 1)[1:], nodes[1].transpose(0, 1)[[0, 3]])
    assert torch.equal(kept(cache, 1)[:1], first[1].transpose(0, 1)[:1])
    assert torch.equal(cache.layers[0].values[0, :, 3:6].transpose(0, 1), 2 * nodes[0].transpose(0, 1)[[0, 2, 5]])


def test_selected_rows_are_kept_in_the_order_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = RaggedCache(3, 8)
    keys, _ = states(3, 4, generator)
    cache.update(keys, keys, 0)
    cache.rollback([4, 2, 3])
    cache.select_rows(torch.tensor([2, 0]), [2, 0])
    assert cache.lengths == [3, 4]
    assert torch.equal(kept(cache, 0), keys[2, :, :3].transpose(0, 1))


def dynamic(rows: int, length: int) -> DynamicCache:
    generator = torch.Generator().manual_seed(1)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*states(rows, length, generator), layer)
    return cache


def test_a_transformers_cache_is_taken_over_without_its_padding_and_given_back_with_it() -> None:
    theirs = dynamic(2, 5)
    cache = RaggedCache(2, 3)
    slots = torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 0, 1]])  # row 1 has two slots of padding
    cache.adopt(theirs, slots, [5, 3])
    assert torch.equal(kept(cache, 0, 1), theirs.layers[1].keys[0].transpose(0, 1))
    assert torch.equal(kept(cache, 1, 1), theirs.layers[1].keys[1, :, 2:].transpose(0, 1))
    back = cache.padded([0, 2])
    assert back.get_seq_length() == 5
    assert torch.equal(back.layers[0].keys[0], theirs.layers[0].keys[0])
    assert torch.equal(back.layers[0].values[1, :, 2:], theirs.layers[0].values[1, :, 2:])


def test_caches_that_forget_tokens_or_have_other_rows_are_refused() -> None:
    cache = RaggedCache(2, 8)
    with pytest.raises(InputError, match="3 rows"):
        cache.adopt(dynamic(3, 4), torch.arange(4).expand(2, -1), [4, 4])
    sliding = DynamicCache(config=target("mistral").config)
    sliding.update(*states(2, 4, torch.Generator()), 0)
    with pytest.raises(UnsupportedModelError, match="every past token"):
        cache.adopt(sliding, torch.arange(4).expand(2, -1), [4, 4])
