"""Blocks kept beside a matrix give its own products, and leave no trace in the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from polyspec import laid_out as module
from polyspec.laid_out import FEW, laid_out, lays_out, using
from polyspec.target import make_target
from tests.tiny_models import target

needs_blocks = pytest.mark.skipif(not lays_out(), reason="this processor has no bfloat16 instructions")


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 128, bias=False), Doubled(128, 32)).to(torch.bfloat16)


@needs_blocks
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, FEW, FEW + 1])
def test_a_layer_gives_its_own_products(rows: int) -> None:
    layers = model()
    x = torch.randn(rows, 96, dtype=torch.bfloat16)
    with using(laid_out(layers)):
        ours = layers(x)
    torch.testing.assert_close(ours, layers(x), atol=0.02, rtol=0.02)


@needs_blocks
def test_only_ordinary_layers_in_bfloat16_are_laid_out() -> None:
    layers = model()
    assert [m for m, _ in laid_out(layers)] == [layers[0], layers[1]]
    layers[0].forward = lambda input: functional.linear(input, layers[0].weight)  # as accelerate does
    assert [m for m, _ in laid_out(layers)] == [layers[1]]
    assert laid_out(layers.float()) == []


@needs_blocks
def test_a_model_larger_than_memory_allows_keeps_its_matrices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE", 10**12)
    assert laid_out(model()) == []


@needs_blocks
@torch.no_grad()
def test_changed_weights_are_laid_out_anew() -> None:
    layers, x = model(), torch.randn(2, 96, dtype=torch.bfloat16)
    before = laid_out(layers)
    assert [f for _, f in laid_out(layers)] == [f for _, f in before]  # once a model
    layers[0].weight.mul_(3)
    with using(laid_out(layers)):
        inside = layers(x)
    torch.testing.assert_close(inside, layers(x), atol=0.05, rtol=0.02)


@needs_blocks
def test_gradients_go_through_the_matrix() -> None:
    layers, x = model(), torch.randn(2, 96, dtype=torch.bfloat16)
    with using(laid_out(layers)):
        layers(x).sum().backward()
    assert all(p.grad is not None for p in layers.parameters())


@needs_blocks
def test_a_failed_run_leaves_the_layers_as_they_were() -> None:
    layers = model()
    with pytest.raises(RuntimeError), using(laid_out(layers)):
        assert "forward" in vars(layers[0])
        layers(torch.zeros(1, 3, dtype=torch.bfloat16))
    assert not any("forward" in vars(m) for m in layers)


@needs_blocks
@torch.no_grad()
def test_every_pass_of_a_target_goes_through_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = target("llama").to(torch.bfloat16), []
    own = model.lm_head.forward

    def counted(input: Tensor) -> Tensor:
        called.append(input.shape)
        return own(input)

    run = module.forward_of
    monkeypatch.setattr(module, "forward_of", lambda w, b: counted if w is model.lm_head.weight else run(w, b))
    made = make_target(model)
    made.prefill(torch.tensor([[3, 4, 5]]), capacity=16)
    made.forward(torch.tensor([[5, 6]]))
    assert called == [(1, 1, 32), (1, 2, 32)]
    assert "forward" not in vars(model.lm_head)
