"""What an image model draws by itself becomes data that draft heads learn from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from polyspec.drafting.dflash import DFlashModel
from polyspec.modalities.image.own_data import UNCONDITIONAL, DataSource
from polyspec.training import Schedule, compute_features, train_head
from polyspec.training.objectives import DFlashObjective

_spec = importlib.util.spec_from_file_location("tiny_janus", Path(__file__).with_name("tiny_janus.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
tiny_janus = _module.tiny_janus

PROMPTS = ["red heart", "star", "blue blue car"]


def source() -> DataSource:
    return DataSource({"target": tiny_janus(), "prompts": PROMPTS})


def test_rows_are_prompts_and_their_pictures(tmp_path: Path) -> None:
    data = source()
    corpus = data.corpus(tmp_path, tokens=16 * 16, batch=8)
    ids, mask = data.target.encode(data.pipe.processor, PROMPTS)
    vocab = data.target.vocab_size
    assert len(corpus) == 16 and corpus.generated() == 16 * 16
    for i in range(len(corpus)):
        row, prompt = corpus.row(i), int(corpus.prompts[i])
        assert bool((row[prompt:] < vocab).all()) and bool((row[:prompt] >= vocab).all())
        conditional = torch.equal(row[:prompt], ids[i % 3][mask[i % 3].bool()])
        assert conditional == (i % UNCONDITIONAL != UNCONDITIONAL - 1)


def test_the_same_pictures_are_drawn_however_often_drawing_is_interrupted(tmp_path: Path) -> None:
    whole = source().corpus(tmp_path / "whole", tokens=16 * 8, batch=4)
    source().corpus(tmp_path / "parts", tokens=16 * 4, batch=4)
    parts = source().corpus(tmp_path / "parts", tokens=16 * 8, batch=4)
    assert (whole.tokens == parts.tokens).all() and (whole.prompts == parts.prompts).all()


def test_a_block_drafter_learns_from_them(tmp_path: Path) -> None:
    data = source()
    corpus = data.corpus(tmp_path / "data", tokens=16 * 24, batch=8)
    depth = data.target.config.num_hidden_layers
    head = DFlashModel.for_target(data.target, block=5, target_layers=[1], bridge=True)
    features = compute_features(data.target, corpus, [1, depth], tmp_path / "features")
    data.target.hidden_layers = ()
    schedule = Schedule(steps=60, batch=8, learning_rate=3e-3, warmup=5)
    first = train_head(head, data.target, corpus, features, DFlashObjective(), Schedule(steps=1, batch=8), tmp_path / "a")
    then = train_head(head, data.target, corpus, features, DFlashObjective(), schedule, tmp_path / "b")
    assert then["loss"] < first["loss"]
