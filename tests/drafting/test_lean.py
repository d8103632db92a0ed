"""What drafters evaluate is what was trained: the made-ready layers give the modules' own results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from polyspec.cache import RaggedCache
from polyspec.drafting import lean
from polyspec.drafting.dflash import DFlashModel, LeanDFlash
from polyspec.drafting.eagle import EagleModel, LeanEagle
from polyspec.drafting.lean import Frozen, rows_of
from polyspec.drafting.lean_llama import LeanLlama, draft_target, is_small_llama
from polyspec.laid_out import derived, linear
from polyspec.target import Target
from polyspec.trees import Tree
from tests.tiny_models import DECODER, VOCAB, llama, target

ROWS, WIDTH, BLOCK = 2, 32, 4
SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "scaled": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
}


def shaken(model: Any) -> Any:
    """Weights that no symmetry hides: those of norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def eagle(**sizes: Any) -> EagleModel:
    return shaken(EagleModel.for_target(target("llama"), **sizes))


def block(**sizes: Any) -> DFlashModel:
    return shaken(DFlashModel.for_target(target("llama"), block=BLOCK, layers=2, target_layers=[0, 1, 2], **sizes))


def eagle_pair(model: EagleModel, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Predictions of the last entries of rows of `lengths`, in one pass of the model and step by step in a ragged cache."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    embedded, features = torch.randn(2, ROWS, longest, WIDTH, generator=generator)
    order = torch.arange(longest)
    whole = model(embedded, features, order[None], (order <= order[:, None])[None, None])
    ready, cache, at = LeanEagle(model), RaggedCache(ROWS, 4), torch.tensor(lengths)[:, None] - 1
    short = min(lengths) - 1
    causal = (order[:short] <= order[:short, None])[None, None]
    ready(embedded[:, :short], features[:, :short], ready.turns.behind(cache, short), causal, cache)
    cache.rollback([short] * ROWS)
    out = features
    for step in range(longest - short):  # rows that are done write their last entry again
        place = torch.minimum(torch.full_like(at, short + step), at)
        cache.rollback(place[:, 0].tolist())
        pick = place[..., None].expand(-1, -1, WIDTH)
        visible = torch.arange(cache.longest + 1) <= place[..., None]
        out = ready(
            embedded.gather(1, pick), features.gather(1, pick), ready.turns.behind(cache, 1), visible[:, None], cache
        )
    return whole.gather(1, at[..., None].expand(-1, -1, WIDTH)), out


@torch.no_grad()
def test_the_last_entry_alone_is_what_it_is_among_all() -> None:
    ready, order = LeanEagle(eagle()), torch.arange(6)
    embedded, features = torch.randn(2, ROWS, 6, WIDTH)
    causal = (order <= order[:, None])[None, None]
    caches = RaggedCache(ROWS, 8), RaggedCache(ROWS, 8)
    every = ready(embedded, features, ready.turns.upto(6)[:6], causal, caches[0])
    alone = ready(embedded, features, ready.turns.upto(6)[:6], None, caches[1], last=True)
    torch.testing.assert_close(alone, every[:, -1:])
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values))


def block_pair(model: DFlashModel) -> tuple[Tensor, Tensor]:
    """A block behind rows of 5 and 3 committed tokens, by the model's methods and by the made-ready ones."""
    generator = torch.Generator().manual_seed(2)
    lengths, order = torch.tensor([5, 3]), torch.arange(5)
    hidden = tuple(
        torch.randn(3, ROWS, 5, WIDTH, generator=generator) * torch.tensor([1.0, 30.0, 1.0])[:, None, None, None]
    )
    embedded = torch.randn(ROWS, WIDTH, generator=generator)
    context = model.context(hidden)
    known, last = model.keys_values(context, order[None]), context[torch.arange(ROWS), lengths - 1]
    mask = functional.pad(order < lengths[:, None], (0, BLOCK), value=True)[:, None, None, :]

    def attended(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return torch.cat([known[layer][0], keys], dim=2), torch.cat([known[layer][1], values], dim=2)

    x = model.queries(embedded, last)
    expected = model(x, lengths[:, None] + torch.arange(BLOCK), mask, attended)

    ready, cache = LeanDFlash(model), RaggedCache(ROWS, 4)
    theirs = ready.context(hidden)
    ready.remember(theirs[:, :3], cache)  # in two rounds, of which the first keeps less of the first row
    cache.rollback([2, 3])
    columns = (torch.tensor(cache.lengths)[:, None] + torch.arange(3)).clamp(max=4)
    ready.remember(theirs.gather(1, columns[..., None].expand(-1, -1, theirs.shape[2])), cache)
    cache.rollback(lengths.tolist())
    visible = (torch.arange(5 + BLOCK) < lengths[:, None] + BLOCK)[:, None, None, :]
    last = theirs[torch.arange(ROWS), lengths - 1]
    return expected, ready(ready.queries(embedded, last), visible, cache)


@pytest.mark.parametrize("lengths", [[6, 6], [7, 4]], ids=["even", "ragged"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_an_eagle_step_predicts_what_the_model_does(sizes: dict[str, Any], lengths: list[int]) -> None:
    torch.testing.assert_close(*eagle_pair(eagle(**sizes), lengths), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bridge", [False, True])
@pytest.mark.parametrize("sizes", [*SIZES.values(), {"hidden_size": 16}], ids=[*SIZES, "narrow"])
@torch.no_grad()
def test_a_block_is_what_the_model_drafts(sizes: dict[str, Any], bridge: bool) -> None:
    if "attention_bias" in sizes:
        sizes = {"mlp_bias": True}  # its own attention has none
    torch.testing.assert_close(*block_pair(block(bridge=bridge, **sizes)), rtol=1e-4, atol=1e-4)


WRONG: dict[str, tuple[str, Any]] = {
    "rows of heads not interleaved": ("Interleaved", lambda projection, dim: projection),
    "a norm's weight left out": (
        "gain",
        lambda norm: torch.full_like(norm.weight.detach(), norm.weight.numel() ** 0.5),
    ),
    "a norm without its ε": ("floor", lambda width, eps, device: torch.tensor(width**0.5)),
}


@pytest.mark.parametrize("name, put", WRONG.values(), ids=WRONG)
@torch.no_grad()
def test_a_wrong_layer_would_be_noticed(name: str, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, name, put)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(*eagle_pair(eagle(), [6, 6]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_matrix_laid_out_before_multiplies_as_the_layer_does() -> None:
    layer, x = nn.Linear(48, 40).bfloat16(), torch.randn(2, 3, 48).bfloat16()
    for part in (x, x[:, 1:2], torch.randn(2, 3, 96).bfloat16()[..., 10:58]):
        torch.testing.assert_close(linear(layer.weight, layer.bias)(part), layer(part), rtol=0.01, atol=0.01)


def test_what_is_derived_follows_the_weights() -> None:
    layer = nn.Linear(4, 3)
    rows = torch.tensor([2, 0])

    def frozen() -> Frozen:
        return derived(layer, "rows", lambda: Frozen(rows_of(layer, rows)), rows)

    x, first = torch.randn(5, 4), frozen()
    torch.testing.assert_close(first(x), layer(x)[:, rows])
    assert frozen() is first
    with torch.no_grad():
        layer.weight += 1
    assert frozen() is not first
    torch.testing.assert_close(frozen()(x), layer(x)[:, rows])
    x.requires_grad_()
    assert frozen()(x).requires_grad


def test_a_recurrence_is_what_the_model_gives_for_the_whole_block() -> None:
    model = block(recurrent=6)
    hidden, embedded = torch.randn(2, ROWS, BLOCK - 1, WIDTH, generator=torch.Generator().manual_seed(4))
    ready, state, found = LeanDFlash(model).recurrence, None, []
    assert ready is not None
    for i in range(BLOCK - 1):
        state = ready(ready.hidden(hidden[:, i]), embedded[:, i], state)
        found.append(hidden[:, i] + ready.out(state))
    expected = model.along(hidden, embedded)
    torch.testing.assert_close(torch.stack(found, dim=1), expected)
    changed = embedded.clone()
    changed[:, 0] += 1  # the first token matters to all places behind it, as far as the state carries
    assert ((model.along(hidden, changed) - expected).abs().amax((0, 2)) > 1e-6).all()


def test_a_small_llama_gives_what_transformers_gives() -> None:
    """A ragged batch, a tree behind it, more tokens behind one of its paths: logits of both ways to run the model, in
    bfloat16 no further from the float32 ones than those of transformers."""
    model = shaken(llama())
    tokens = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    tree = Tree(torch.tensor([-1, -1, 0, 1]), height=2, width=2)

    def logits(kind: type[Target]) -> Tensor:
        assert is_small_llama(model)
        ours = kind(model)
        ours.prefill(tokens, mask, capacity=16)
        nodes = ours.forward(tokens[:, :5], tree).logits
        ours.keep_path(torch.tensor([[0, 1, 3], [0, 2, 4]]))
        ours.rollback([n + 3 for n in (6, 3)])
        return torch.cat([nodes, ours.forward(tokens[:, :1]).logits], dim=1).float()

    expected = logits(Target)
    torch.testing.assert_close(logits(LeanLlama), expected)
    model.to(torch.bfloat16)
    rounded, lean = ((logits(kind) - expected).pow(2).mean() for kind in (Target, LeanLlama))
    assert lean < 1.5 * rounded


def test_a_llama_that_somebody_changed_runs_as_it_is() -> None:
    model = llama()
    assert is_small_llama(model) and isinstance(draft_target(model), LeanLlama)
    handle = model.model.layers[0].register_forward_hook(lambda *a: None)
    assert not is_small_llama(model)
    handle.remove()
    stretched = LlamaForCausalLM(
        LlamaConfig(**DECODER, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    for other in (target("qwen3"), target("gpt2"), stretched):
        assert not is_small_llama(other) and not isinstance(draft_target(other), LeanLlama)
