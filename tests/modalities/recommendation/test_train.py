"""Training a recommender: the folder it leaves recommends from Python and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polyspec
from polyspec.modalities.recommendation import train as module
from polyspec.modalities.recommendation.data import Example, Interactions
from polyspec.modalities.recommendation.items import Items
from polyspec.modalities.recommendation.train import (
    AtSpeedObjective,
    ItemsConfig,
    ModelConfig,
    Windows,
    embed_items,
    labels,
    make_items,
    measure,
    train,
)
from polyspec.training import Schedule


def walks(users: int = 60, items: int = 40) -> Interactions:
    """Users who go round in a circle of items, from anywhere: item i is followed by i + 1."""
    random = np.random.default_rng(0)
    rows = [[int((start + i) % items) for i in range(12)] for start in random.integers(0, items, users)]
    return Interactions(
        train=[r[:-2] for r in rows],
        valid=[Example(u, r[:-2], r[-2:-1]) for u, r in enumerate(rows)],
        test=[Example(u, r[:-1], r[-1:]) for u, r in enumerate(rows)],
        items=list(range(items)),
        titles={i: f"item {i}" for i in range(items)},
    )


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "recommendation",
        "output": str(output),
        "data": walks,
        "items": ItemsConfig(levels=2, codes=8, dimensions=8, max_history=6),
        "model": ModelConfig(hidden_size=32, layers=1, heads=2, item_dropout=0.1),
        "schedule": Schedule(steps=150, batch=16, learning_rate=5e-3, warmup=5),
        "draft": {
            "model": ModelConfig(hidden_size=16, layers=1, heads=2),
            "objective": AtSpeedObjective(k=4),
            "schedule": Schedule(steps=80, batch=16, learning_rate=5e-3, warmup=5),
        },
        "measure": lambda *given: measure(*given, k=3, beams=10),
        **changes,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(settings(tmp_path_factory.mktemp("recommender")))


def test_what_was_learnt_is_recommended_and_beats_popularity(trained: Path) -> None:
    figures = json.loads((trained / "quality.json").read_text())
    assert figures["recall@3"] > 0.5 > figures["recall@3, popularity"]
    pipe = polyspec.pipeline("recommendation", target=str(trained))
    assert pipe.method.recipe.name == "atspeed_s"
    plain = polyspec.pipeline("recommendation", target=str(trained), recipe="autoregressive")
    history = [4, 5, 6, 7]
    lists = [[r.item_id for r in p(history, k=5).outputs[0]] for p in (pipe, plain)]
    assert lists[0] == lists[1]
    assert 8 in lists[0]


def test_the_command_line_recommends(trained: Path, tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "polyspec", "modality=recommendation", f"target={trained}", *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    done = run("history=[[4,5,6],[20]]", "k=3", "deny=[7]", "output=lists.json")
    assert done.returncode == 0, done.stderr
    lists = json.loads((tmp_path / "lists.json").read_text())
    assert [len(row) for row in lists] == [3, 3]
    assert 7 not in {r["item_id"] for row in lists for r in row}
    assert lists[0][0]["title"] in done.stdout
    for arguments, fragment in (
        ((), "no history"),
        (("history=[4]", "prompt=x"), "takes no prompt"),
        (("history=[4000]",), "4000"),
        (("history=[4]", "sampling.temperature=0.5"), "temperature does not apply"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and fragment in done.stderr and "Traceback" not in done.stderr


def test_training_again_continues_and_a_finished_one_is_left_alone(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (trained / "model.safetensors").read_bytes()
    monkeypatch.setattr(module, "make_items", None)  # the catalogue is read, not made anew
    train(settings(trained, measure=None))
    assert (trained / "model.safetensors").read_bytes() == before


def test_items_chosen_together_have_near_embeddings_and_every_item_its_own_tokens() -> None:
    found = walks()
    e = torch.nn.functional.normalize(embed_items(found.train, found.items, 16), dim=1)
    near, far = (e * e.roll(1, 0)).sum(1), (e * e.roll(20, 0)).sum(1)
    assert near.mean() > far.mean() + 0.3
    items = make_items(found, ItemsConfig(levels=2, codes=8, dimensions=8))
    assert len(np.unique(items.tokens, axis=0)) == len(items) == 40
    assert items.titles is not None and items.titles[3] == "item 3"


def test_windows_are_stretches_of_histories_with_the_prefix() -> None:
    items = Items(range(9), [[2 + i, 20 + i] for i in range(9)], prefix=[1])
    windows = Windows(items, [[0, 1, 2, 3, 4, 5, 6], [8], [7, 8]], max_history=2, item_dropout=0.0)
    assert len(windows) == 4  # 7 items are three stretches, one item teaches nothing
    torch.manual_seed(0)
    for row in range(3):
        tokens = windows[row]["tokens"].tolist()
        first = tokens[1] - 2
        assert tokens == [1, *(t for i in range(first, first + 3) for t in (2 + i, 20 + i))]
    batch = module.collate([windows[0], windows[3]])
    assert batch["lengths"].tolist() == [7, 5]
    assert labels(batch)[1].tolist() == [*windows[3]["tokens"].tolist()[1:], -100, -100]


def test_the_draft_s_losses_are_lowest_where_they_should_be() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    other = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    relaxed = AtSpeedObjective("relaxed")
    assert relaxed.relaxed(log_p, log_p) == 0
    assert relaxed.relaxed(other, log_p) == pytest.approx(0.5)
    strict = AtSpeedObjective("strict", k=4)
    # over all tokens: the divergence itself, and p_(4) times the entropy
    q = other.exp()
    expected = (q * (other - log_p)).sum() - 0.05 * (q * other).sum()
    torch.testing.assert_close(strict.strict(other, log_p)[0], expected)
    assert strict.strict(log_p, log_p) < strict.strict(other, log_p)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AtSpeedObjective("loose"),
        lambda: AtSpeedObjective(alpha=2),
        lambda: ItemsConfig(levels=0),
        lambda: ModelConfig(hidden_size=8, layers=1, dropout=1.0),
        lambda: module.interactions("netflix"),
        lambda: module.interactions("parquet"),
    ],
)
def test_bad_settings_are_refused(make: Any) -> None:
    with pytest.raises(polyspec.ConfigError):
        make()
