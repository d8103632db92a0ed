"""Training of the image sample: its configuration reaches the code, and a stage goes on where it was interrupted."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import polyspec.conf
from polyspec.modalities.image.train import Budget, DataConfig, DecoderConfig, LMConfig, VQConfig
from polyspec.modalities.image.train.language_model import corrupt
from polyspec.modalities.image.train.stage import Checkpoints, batch_indices, run_stage, step_generator, update


def test_every_node_of_the_shipped_configuration_becomes_what_the_stages_take() -> None:
    config = OmegaConf.load(Path(str(polyspec.conf.__file__)).with_name("train") / "image.yaml")
    config.data.path = "pictures.parquet"
    parts = hydra.utils.instantiate(config, _convert_="all")
    kinds = {"data": DataConfig, "vq": VQConfig, "lm": LMConfig, "decoder": DecoderConfig}
    assert {name: type(parts[name]) for name in kinds} == kinds
    assert isinstance(parts["lm"].budget, Budget)
    module, _, function = parts["entry"].partition(":")
    assert callable(getattr(import_module(module), function))


def run(path: Path, steps: int) -> nn.Module:
    """Fit a line with random inputs, `steps` steps in all."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def train_step(step: int, spent: float) -> dict[str, float]:
        x = torch.rand(8, 3, generator=step_generator(step, seed=1))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        update(optimizer, loss, 0.1)
        return {"loss": loss.item()}

    state = {"model": model, "optimizer": optimizer}
    done = run_stage("line", Budget(steps=steps), Checkpoints(path, 60.0, {}), state, train_step, dict)
    assert done == steps
    return model


def test_an_interrupted_stage_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.pt", 12)
    run(tmp_path / "parts.pt", 5)
    parts = run(tmp_path / "parts.pt", 12)
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole.bias, parts.bias)


def test_an_epoch_visits_every_row_once_and_epochs_differ() -> None:
    first, second = (torch.cat([batch_indices(4 * e + k, 20, 5, seed=3) for k in range(4)]) for e in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("clean", [0.0, 0.4, 1.0])
def test_the_stated_share_of_contexts_is_left_clean(clean: float) -> None:
    tokens = torch.randint(512, (2000, 256), generator=torch.Generator().manual_seed(0))
    kept = (corrupt(tokens, clean, 0.6, torch.Generator().manual_seed(1)) == tokens).all(1).float().mean().item()
    assert clean - 0.04 <= kept <= clean + 0.05  # a swap of length 0 or a rate near 0 also leaves a row as it was
