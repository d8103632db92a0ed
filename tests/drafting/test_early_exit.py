"""Self-speculation through the target's own first layers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, target

import polyspec
from polyspec.drafting.early_exit import shallow

INPUTS = {"input_ids": torch.tensor([[5, 9, 3, 7], [0, 0, 8, 4]]), "attention_mask": torch.tensor([[1] * 4, [0, 0, 1, 1]])}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("guidance", [None, 1.7], ids=["plain", "guided"])
def test_greedy_output_is_the_targets(family: str, guidance: float | None) -> None:
    model, knobs = target(family), {"do_sample": False, "max_new_tokens": 20, "guidance_scale": guidance}
    fast = polyspec.custom_generate("early_exit", length=3)
    assert torch.equal(
        model.generate(**INPUTS, **knobs, custom_generate=fast), model.generate(**INPUTS, **knobs)
    )
    assert fast.stats.draft_calls > 0


def test_every_draft_is_kept_if_the_layers_left_out_do_nothing() -> None:
    model = build("llama", layers=3)
    with torch.no_grad():
        for name, parameter in model.model.layers[1:].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    fast = polyspec.custom_generate("early_exit", exit_layer=1, length=3)
    out = model.generate(INPUTS["input_ids"][:1], do_sample=False, max_new_tokens=20, eos_token_id=None, custom_generate=fast)
    assert out.shape[1] == 24
    assert fast.stats.acceptance_rate == 1


def test_the_shallow_model_shares_all_and_changes_nothing() -> None:
    model = build("gemma3")
    before = model(INPUTS["input_ids"]).logits
    early = shallow(model, 1)
    assert len(early.model.layers) == 1
    assert early.model.layers[0] is model.model.layers[0]
    assert {id(p) for p in early.parameters()} < {id(p) for p in model.parameters()}
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    early(INPUTS["input_ids"])
    assert torch.equal(model(INPUTS["input_ids"]).logits, before)


@pytest.mark.parametrize("layer", [0, 2, 7, "one"])
def test_an_exit_out_of_range_is_refused(layer: object) -> None:
    with pytest.raises(polyspec.ConfigError, match="exit_layer"):
        target("llama").generate(
            **INPUTS, max_new_tokens=4, custom_generate=polyspec.custom_generate("early_exit", exit_layer=layer)
        )
