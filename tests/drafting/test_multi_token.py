"""Multi-token heads: both forms begin as the target's own output layer; checked they are exact, with a threshold they are
what they say."""

from __future__ import annotations

import pytest
import torch
from tiny_models import target
from transformers import GenerationMixin

import polyspec
from polyspec.drafting.multi_token import FORMS, MultiTokenModel
from polyspec.target import make_target
from polyspec.training.objectives import MultiTokenObjective
from polyspec.training.trainer import TokenLayers

PROMPT = torch.tensor([[2, 5, 7, 9], [3, 3, 8, 4]])


def test_both_forms_begin_with_the_targets_own_predictions() -> None:
    model = target("llama")
    hidden = torch.randn(2, 32)
    expected = model.get_output_embeddings()(hidden)[:, None].expand(-1, 3, -1)
    latent, projection = (MultiTokenModel.for_target(model, heads=3, form=form) for form in ("latent", "projection"))
    assert torch.allclose(model.get_output_embeddings()(latent(hidden)), expected, atol=1e-5)
    assert torch.allclose(projection(hidden), expected, atol=1e-5)


def test_unknown_forms_and_too_few_heads_are_refused() -> None:
    with pytest.raises(polyspec.ConfigError, match="form of heads"):
        MultiTokenModel.for_target(target("llama"), form="latnet")
    with pytest.raises(polyspec.ConfigError, match="heads must be"):
        MultiTokenModel.for_target(target("llama"), heads=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "whisper"])
def test_checked_heads_give_the_models_own_tokens(family: str, form: str) -> None:
    model = target(family)
    heads = MultiTokenModel.for_target(make_target(model), heads=3, form=form)
    if family == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": PROMPT}
    else:
        inputs = {"input_ids": PROMPT}
    options = {**inputs, "do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    # Whisper's own generate is a pipeline of segments around this one
    generate = GenerationMixin.generate
    fast = polyspec.custom_generate("speech_mtp", heads=heads, threshold=None, length=3)
    assert torch.equal(generate(model, **options, custom_generate=fast), generate(model, **options))
    assert fast.stats.proposed_tokens > 0
    # sure of nothing, it is the plain loop; sure of everything, it keeps all
    plain = polyspec.custom_generate("speech_mtp", heads=heads, threshold=1.0, length=3)
    assert torch.equal(generate(model, **options, custom_generate=plain), generate(model, **options))
    everything = polyspec.custom_generate("speech_mtp", heads=heads, threshold=0.0, length=3)
    found = generate(model, **{**options, "eos_token_id": None}, custom_generate=everything)
    assert everything.stats.tokens_per_call == 4.0 and found.shape[1] == PROMPT.shape[1] + 24


@pytest.mark.parametrize("form", FORMS)
def test_the_objective_falls_when_heads_learn(form: str) -> None:
    model = target("llama")
    heads = MultiTokenModel.for_target(model, heads=2, form=form).train()
    tokens = model.generate(
        torch.randint(2, 60, (8, 4)), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        hidden = model(tokens[:, :-1], output_hidden_states=True).hidden_states[-1]
    batch = {
        "tokens": tokens,
        "lengths": torch.full((8,), 24),
        "prompts": torch.full((8,), 4),
        "hidden": (hidden, hidden),
    }
    layers, objective = TokenLayers(make_target(model), None), MultiTokenObjective(positions=16)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        loss = objective(heads, layers, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
