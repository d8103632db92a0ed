"""A small Llama as a drafter runs it: what transformers computes, up to rounding, with as few operations as it takes.

A draft model of two layers is asked for one token at a time, and transformers' forward then spends more time between the
matrices than in them (see `polyspec.drafting.lean`). Models that are large, or that differ from a Llama in anything, run as
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from polyspec.drafting.lean import LeanLayer, Turns, floor, gain, stacked, unit
from polyspec.guidance import Guidance
from polyspec.laid_out import derived
from polyspec.target import Output, Target, make_target

LARGEST = 50_000_000  # parameters: of the matrices there is a second copy, and overhead matters to small models only
ROTARY = ("default", "linear", "llama3")  # whose angles depend on the position alone


class Lean:
    """A Llama's decoder and output layer made ready."""

    def __init__(self, model: Any):
        decoder, config = model.model, model.config
        device = decoder.norm.weight.device
        self.embedding = decoder.embed_tokens.weight.detach()
        self.layers = [
            LeanLayer(layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm), config, i)
            for i, layer in enumerate(decoder.layers)
        ]
        self.turns, self.floor = Turns(config, device), floor(config.hidden_size, config.rms_norm_eps, device)
        self.output = stacked([model.lm_head], gain(decoder.norm))


class LeanLlama(Target):
    """The Target of a model that `is_small_llama`."""

    def prefill(self, *args: Any, **kwargs: Any) -> Output | None:
        self.lean = derived(self.model, "lean", lambda: Lean(self.model))
        return super().prefill(*args, **kwargs)

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        assert self.cache is not None
        lean = self.lean
        turns = lean.turns.upto(self.cache.longest + tokens.shape[1])[positions]
        given = self.once.get("inputs_embeds")  # of a prompt that is not tokens alone
        x = (lean.embedding[tokens] if given is None else given).float()
        for layer in lean.layers:
            x = layer(x, turns, mask, self.cache)
        if not keep_logits:
            return None, None
        return lean.output(unit(x[:, -self.wanted :], lean.floor).to(lean.embedding.dtype)), None


def is_small_llama(model: PreTrainedModel) -> bool:
    """Whether LeanLlama computes what the model does: a Llama as transformers has it, in one piece, nobody's hooks on it."""
    config = model.config
    return (
        type(model) is LlamaForCausalLM
        and model.num_parameters() <= LARGEST
        and config._attn_implementation == "sdpa"
        and (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") in ROTARY
        and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
        and all(type(m.weight) is nn.Parameter for m in model.modules() if isinstance(m, nn.Linear))
        and len({p.device for p in model.parameters()}) == 1
        and len({p.dtype for p in model.parameters()}) == 1
    )


def draft_target(model: PreTrainedModel, guidance: Guidance | None = None, hidden_layers: Sequence[int] = ()) -> Target:
    """The Target that a drafter runs `model` by."""
    return (LeanLlama if is_small_llama(model) else make_target)(model, guidance, hidden_layers)
