"""Hidden states taken as they pass are those that transformers returns, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_vlms
import torch
from tiny_models import target

from polyspec.taps import decoder_of, tapped
from polyspec.target import make_target

TEXT = ("llama", "qwen3", "gpt2", "gemma3", "mistral", "mixtral")


def states(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[int, torch.Tensor] | None]:
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        with tapped(model, range(depth + 1), depth) as found:
            model(**inputs)
    return expected, found


@pytest.mark.parametrize("family", [*TEXT, *tiny_vlms.CONFIGS])
def test_hidden_states_are_those_that_transformers_returns(family: str) -> None:
    if family in TEXT:
        model, inputs = target(family), {"input_ids": torch.randint(2, 61, (2, 7))}
    else:
        model, inputs = tiny_vlms.target(family), tiny_vlms.prompt(family, [(3, 1, 2), (3, 1, 2)])
    expected, found = states(model, inputs)
    assert found is not None and len(found) == len(expected)
    for number, theirs in enumerate(expected):
        torch.testing.assert_close(found[number], theirs)


def test_no_hook_stays_behind() -> None:
    model = target("llama")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with tapped(model, (0, 1, 2), 2) as found:
        assert found == {} and hooks() == before + 3
    assert hooks() == before


def test_a_model_built_otherwise_is_asked_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = target("llama"), torch.tensor([[4, 5, 6]])
    expected = make_target(model, hidden_layers=(1,)).prefill(tokens, capacity=8)
    monkeypatch.setattr("polyspec.taps.HOMES", ("elsewhere",))
    assert decoder_of(model, 2) is None
    found = make_target(model, hidden_layers=(1,)).prefill(tokens, capacity=8)
    assert expected is not None and found is not None
    assert torch.equal(expected.hidden[0], found.hidden[0])
