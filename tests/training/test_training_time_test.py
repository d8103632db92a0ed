"""EAGLE heads are trained to draft as they will: their own features stand in for what is drafted, the target's stay
for what is committed."""

from __future__ import annotations

import pytest
import torch
from tiny_models import target
from torch import Tensor
from transformers import DynamicCache

from polyspec.drafting.eagle import EagleModel
from polyspec.drafting.heads import TokenLayers
from polyspec.target import make_target
from polyspec.training import corpus_of, objectives
from polyspec.training.features import compute_features
from polyspec.training.objectives import EagleObjective
from polyspec.training.trainer import collate

STEPS, ANCHORS, PROMPT = 3, [3, 7, 12], 4


def drafted(model: EagleModel, embedded: Tensor, features: Tensor, anchor: int, true_context: bool) -> list[Tensor]:
    """Features that drafting from entry `anchor` predicts, entry by entry as the drafter does. Without `true_context`
    the wrong way: every later step sees nothing but predictions."""
    positions = torch.arange(embedded.shape[1])
    cache = DynamicCache()
    mask = torch.ones(anchor + 1, anchor + 1, dtype=torch.bool).tril()[None, None]
    out = model(embedded[:, : anchor + 1], features[:, : anchor + 1], positions[None, : anchor + 1], mask, cache)
    found = [out[:, -1:]]
    if not true_context:
        features = torch.cat([features[:, :1], out], dim=1)
        cache = DynamicCache()
        model(embedded[:, : anchor + 1], features[:, : anchor + 1], positions[None, : anchor + 1], mask, cache)
    for step in range(1, STEPS):
        at = anchor + step
        found.append(model(embedded[:, at : at + 1], found[-1], positions[None, at : at + 1], None, cache))
    return found


@pytest.mark.parametrize("true_context", [True, False])
def test_the_objective_sees_what_drafting_sees(tmp_path, monkeypatch, true_context: bool) -> None:  # type: ignore[no-untyped-def]
    model, tgt = EagleModel.for_target(target("llama"), target_layers=[1, 2]), make_target(target("llama"))
    corpus = corpus_of([torch.randint(2, 61, (24,)).tolist()], [PROMPT])
    stored = compute_features(tgt, corpus, [1, 2, 2], tmp_path).row(0)
    hidden = tuple(h.float() for h in stored)
    batch = collate([{"tokens": corpus.row(0), "prompt": PROMPT, "hidden": hidden}])
    layers = TokenLayers(tgt, None)
    monkeypatch.setattr(objectives, "random_positions", lambda *args: torch.tensor([ANCHORS]))
    objective = EagleObjective(positions=len(ANCHORS), classification=1.0, noise=0.0, steps=STEPS)
    expected = torch.zeros(())
    with torch.no_grad():
        loss = objective(model, layers, batch)["loss"]
        *inputs, last = batch["hidden"]
        embedded, features = layers.embed(batch["tokens"][:, 1:]), model.features(tuple(inputs))
        for anchor in ANCHORS:
            for step, feature in enumerate(drafted(model, embedded, features, anchor, true_context)):
                p = layers.logits(last[:, anchor + step + 1]).softmax(-1)
                cross = -(p * layers.logits(feature[:, 0]).log_softmax(-1)).sum()
                expected += objective.decay**step * cross / len(ANCHORS)
    close = torch.isclose(loss, expected, rtol=1e-5)
    assert bool(close) == true_context, (loss, expected)
