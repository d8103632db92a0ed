"""Semantic IDs and the catalogue file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from polyspec.errors import CheckpointError, ConfigError, InputError
from polyspec.modalities.recommendation.items import FILE, Items
from polyspec.modalities.recommendation.semantic_ids import ResidualQuantiser, as_tokens, with_digit

TOKENS = np.array([[2, 10, 20], [2, 10, 21], [3, 10, 20], [2, 10, 20]])


def items(**changes) -> Items:
    return Items(**{"ids": [7, 5, 100, 8], "tokens": TOKENS, "titles": ["a", "b", "c", "d"], "prefix": [1], **changes})


# -- semantic ids --------------------------------------------------------------------------------------------------------


def clustered(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """300 points in 6 far groups of 5 near ones, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(6).repeat_interleave(50)
    centres = torch.eye(6) * 100
    return centres[groups] + torch.randn(300, 6, generator=generator), groups


def test_codes_of_one_group_share_their_first_level():
    points, groups = clustered()
    codes = ResidualQuantiser.fit(points, levels=3, codes=6).encode(points)
    assert codes.shape == (300, 3) and codes.dtype == torch.long
    purity = sum(int(groups[codes[:, 0] == c].bincount().max()) for c in codes[:, 0].unique())
    assert purity >= 250


def test_every_level_comes_closer():
    points, _ = clustered()
    errors = []
    for levels in (1, 2, 3):
        quantiser = ResidualQuantiser.fit(points, levels=levels, codes=8)
        codes = quantiser.encode(points)
        errors.append(float((points - sum(quantiser.codebooks[d][codes[:, d]] for d in range(levels))).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.5 * errors[0]


def test_the_same_seed_gives_the_same_codes_and_another_may_not():
    points, _ = clustered()
    one, two, other = (ResidualQuantiser.fit(points, codes=8, seed=s).encode(points) for s in (3, 3, 4))
    assert one.equal(two) and not one.equal(other)


def test_fewer_different_items_than_codes_get_codes_of_their_own():
    points = torch.tensor([[0.0], [1.0], [1.0], [5.0]])
    codes = ResidualQuantiser.fit(points, levels=2, codes=16).encode(points)
    assert len(codes[:, 0].unique()) == 3 and codes[1].equal(codes[2])


def test_the_last_digit_tells_equal_codes_apart_and_nothing_else():
    codes = np.random.default_rng(0).integers(0, 3, (100, 3))
    told = with_digit(codes)
    assert (told[:, :3] == codes).all()
    assert len({tuple(t) for t in told.tolist()}) == 100
    for group in {tuple(c) for c in codes.tolist()}:
        digits = told[(codes == group).all(1), 3]
        assert digits.tolist() == list(range(len(digits)))


def test_levels_have_tokens_of_their_own():
    tokens = as_tokens(np.array([[0, 0, 0], [4, 2, 1]]), [5, 3, 2], first=10)
    assert tokens.tolist() == [[10, 15, 18], [14, 17, 19]]


# -- the catalogue -------------------------------------------------------------------------------------------------------


def test_a_catalogue_is_read_as_it_was_written(tmp_path: Path):
    written = items(max_history=5)
    written.save(tmp_path)
    read = Items.load(tmp_path)
    assert (read.ids, read.titles, read.prefix, read.max_history) == (written.ids, written.titles, [1], 5)
    assert (read.tokens == TOKENS).all()
    assert Items.load(tmp_path / FILE).ids == read.ids


def test_a_prompt_is_the_prefix_and_the_latest_items():
    assert items().prompt([7, 100], 100) == [1, 2, 10, 20, 3, 10, 20]
    assert items().prompt([7, 100, 5], 8) == [1, 3, 10, 20, 2, 10, 21]
    assert items(max_history=1).prompt([7, 100, 5], 100) == [1, 2, 10, 21]


def test_items_that_share_an_id_follow_each_other_and_filters_tell_them_apart():
    catalogue = items()
    leaf = catalogue.trie.leaf.tolist()
    found = catalogue.recommendations([leaf[0], leaf[1], 0], [-1.0, -2.0, -9.0], None, 10)
    assert [(r.item_id, r.title, r.score) for r in found] == [(7, "a", -1.0), (8, "d", -1.0), (5, "b", -2.0)]
    found = catalogue.recommendations([leaf[0], leaf[1]], [-1.0, -2.0], catalogue.allowed(None, [7]), 10)
    assert [r.item_id for r in found] == [8, 5]
    assert len(catalogue.recommendations([leaf[0], leaf[1]], [-1.0, -2.0], None, 2)) == 2


def test_allowed_and_denied():
    catalogue = items()
    assert catalogue.allowed(None, None) is None
    assert catalogue.allowed([7, 5], None).tolist() == [True, True, False, False]
    assert catalogue.allowed(None, {100}).tolist() == [True, True, False, True]
    assert catalogue.allowed([7, 5], [5]).tolist() == [True, False, False, False]


def test_items_come_and_go():
    more = items().with_items([9], [[4, 10, 20]], ["e"])
    assert more.ids[-1] == 9 and more.titles[-1] == "e" and len(more) == 5
    less = more.without([7, 5])
    assert less.ids == [100, 8, 9] and less.titles == ["c", "d", "e"] and len(less.tokens) == 3


WRONG = {
    "an id twice": (lambda: items(ids=[7, 5, 7, 8]), InputError, "7 occurs"),
    "ids for other items": (lambda: items(ids=[7]), InputError, "do not match"),
    "titles for other items": (lambda: items(titles=["a"]), InputError, "do not match"),
    "tuples of different lengths": (lambda: items(tokens=[[1, 2], [3]]), InputError, "one length"),
    "fractions for tokens": (lambda: items(tokens=TOKENS / 2), InputError, "whole numbers"),
    "negative tokens": (lambda: items(tokens=TOKENS - 5), InputError, "≥ 0"),
    "no items": (lambda: Items([], np.zeros((0, 3), int)), InputError, "empty"),
    "no history allowed": (lambda: items(max_history=0), InputError, "max_history"),
    "an empty history": (lambda: items().prompt([], 100), InputError, "empty"),
    "an unknown item": (lambda: items().prompt([7, 6], 100), InputError, "not known: 6"),
    "many unknown items": (lambda: items().prompt([1, 2, 3, 4, 6], 100), InputError, "1, 2, 3 and 2 more"),
    "an item that is no number": (lambda: items().prompt(["7"], 100), InputError, "whole numbers; got '7'"),
    "no room": (lambda: items().prompt([7], 3), InputError, "no room"),
    "an unknown item allowed": (lambda: items().allowed([6], None), InputError, "allow holds"),
    "an unknown item denied": (lambda: items().allowed(None, [6]), InputError, "deny holds"),
    "everything denied": (lambda: items().allowed(None, [7, 5, 100, 8]), InputError, "leave no item"),
    "nothing allowed": (lambda: items().allowed([], None), InputError, "leave no item"),
    "all it allows denied": (lambda: items().allowed([7], [7]), InputError, "leave no item"),
    "an item added twice": (lambda: items().with_items([7], [[4, 10, 20]]), InputError, "7 occurs"),
    "a longer item added": (lambda: items().with_items([9], [[4, 10, 20, 3]]), InputError, "3 tokens"),
    "an unknown item removed": (lambda: items().without([6]), InputError, "not known: 6"),
    "every item removed": (lambda: items().without([7, 5, 100, 8]), InputError, "no item"),
    "no embeddings": (lambda: ResidualQuantiser.fit(torch.zeros(0, 3)), InputError, "embeddings"),
    "embeddings with NaN": (lambda: ResidualQuantiser.fit(torch.full((4, 3), float("nan"))), InputError, "finite"),
    "no codes": (lambda: ResidualQuantiser.fit(torch.zeros(4, 3), codes=0), ConfigError, "codes"),
    "embeddings of another width": (
        lambda: ResidualQuantiser.fit(torch.rand(4, 3)).encode(torch.rand(4, 2)),
        InputError,
        "2 dimensions",
    ),
    "a code beyond its level": (lambda: as_tokens(np.array([[3]]), [3], 0), InputError, "do not fit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_items_is_one_clear_error(case):
    attempt, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        attempt()


def rewrite(path: Path, **changes) -> None:
    """The file with other contents and its old checksum."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = {**load_file(path), **changes.pop("arrays", {})}
    save_file({k: v for k, v in arrays.items() if v is not None}, path, {**metadata, **changes})


DAMAGE = {
    "missing": (lambda path: path.unlink(), "no folder with a catalogue"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
    "one bit flipped": (
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        "checksum",
    ),
    "text": (lambda path: path.write_text("item 1, item 2"), "damaged"),
    "another file": (lambda path: save_file({"x": np.zeros(3)}, path), "no catalogue"),
    "without tokens": (lambda path: rewrite(path, arrays={"tokens": None}), "no catalogue"),
    "of another version": (lambda path: rewrite(path, format="polyspec items 9"), "no catalogue"),
    "with other tokens": (lambda path: rewrite(path, arrays={"tokens": TOKENS + 1}), "checksum"),
    "described otherwise": (lambda path: rewrite(path, items=json.dumps({"prefix": []})), "checksum"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_catalogue_is_one_clear_error(case, tmp_path: Path):
    harm, message = DAMAGE[case]
    harm(items().save(tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        Items.load(tmp_path)
    assert FILE in str(caught.value)


def test_a_catalogue_that_is_whole_but_wrong_is_refused(tmp_path: Path):
    from polyspec.modalities.recommendation.items import FORMAT, checksum

    arrays, described = {"ids": np.array([1, 1]), "tokens": np.array([[1], [2]])}, "{}"
    metadata = {"format": FORMAT, "items": described, "sha256": checksum(arrays, described)}
    save_file(arrays, tmp_path / FILE, metadata)
    with pytest.raises(CheckpointError, match="occurs more than once"):
        Items.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        items().save(tmp_path / "taken")
