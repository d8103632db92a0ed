"""The shipped recommender: it draws lists without a download, the same with and without drafts, better than popularity."""

from __future__ import annotations

import json
from typing import Any

import pytest

import polyspec
from polyspec.errors import CheckpointError
from polyspec.modalities.recommendation import sample
from polyspec.modalities.recommendation.items import Items

HISTORIES = [[1, 50, 181], [7], [288, 300, 328, 333, 313], list(range(1, 80))]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise CheckpointError("offline")

    monkeypatch.setattr(sample, "movielens", refuse)


def test_the_folder_holds_nothing_that_may_not_be_given_on() -> None:
    items = Items.load(sample.sample_path())
    assert len(items) == 1682
    assert items.titles is None


@pytest.mark.parametrize("k", [1, 10])
def test_lists_with_drafts_are_the_plain_lists(k: int) -> None:
    pipe = polyspec.pipeline("recommendation", dtype="float32")
    assert pipe.method.recipe.name == "atspeed_s"
    plain = polyspec.pipeline("recommendation", recipe="autoregressive", dtype="float32")
    fast, slow = pipe(HISTORIES, k=k), plain(HISTORIES, k=k)
    assert [[r.item_id for r in row] for row in fast.outputs] == [[r.item_id for r in row] for row in slow.outputs]
    assert fast.stats.target_calls < slow.stats.target_calls


def test_it_was_measured_and_is_better_than_popularity() -> None:
    figures = json.loads((sample.sample_path() / "quality.json").read_text())
    assert figures["recall@10"] > 1.5 * figures["recall@10, popularity"]


def test_the_load_generator_asks_for_the_sample_s_items_where_no_target_is_named() -> None:
    from omegaconf import OmegaConf

    from polyspec.modalities.recommendation.serve import example_requests

    config, settings = OmegaConf.create({"target": None, "seed": 0}), {"arguments": {}, "prompts": None, "count": 2}
    path, bodies = example_requests(config, settings)
    assert path == "/v1/recommendations" and all(1 <= i <= 1682 for body in bodies for i in body["history"])
