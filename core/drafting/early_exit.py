"""The target's own first layers draft.

LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, 2404.16710, §4.3; the shallow form of Draft &
Verify, 2309.08168. With E of the target's L layers, its final norm and its output layer,

    q(x_{t+1}) = softmax(W_U norm(Layer_E(… Layer_1(e(x_t)))));

no weights are added. The first E layers compute the same keys and values whether they draft or verify, so the drafter
works in the target's own cache: nothing is prefilled twice, and the verifying pass overwrites its entries with the same
values. Exact under any exact rule. Worth its while for models trained with layer dropout and an early-exit loss, as the
paper does; the middle layers of other models seldom predict the next token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyspec.drafting.base import Context, Draft
from polyspec.errors import ConfigError, UnsupportedModelError
from polyspec.lengths import positive
from polyspec.target import Target


def shallow(model: PreTrainedModel, layers: int) -> Any:
    """`model` with its decoder's first `layers` layers only, all parameters shared. Nothing is copied, `model` stays as
    it is. Raises UnsupportedModelError where no list of layers is found, ConfigError for a number out of range."""
    stack = find_stack(model)
    if stack is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder layers that could be left early; use another recipe"
        )
    depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
    if not 1 <= layers < depth:
        raise ConfigError(f"exit_layer must lie in 1 … {depth - 1} for a target of {depth} layers, got {layers}")
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    *path, last = stack.split(".")
    whole: nn.Module = copy.copy(model)
    here = whole
    for name in [*path, None]:  # every module on the way to the stack gets a copy with children of its own
        here._modules = dict(here._modules)
        if isinstance(here, PreTrainedModel):
            here.config = config if here.config is model.config else text
        if name is not None:
            child = copy.copy(here.get_submodule(name))
            here._modules[name] = child
            here = child
    here._modules[last] = nn.ModuleList(list(here.get_submodule(last).children())[:layers])
    return whole


def find_stack(model: PreTrainedModel) -> str | None:
    """The dotted name of the decoder's list of layers, if it has one."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        inside = any(module is child for child in decoder.children())
        if inside and isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    return None


class EarlyExit:
    """Drafts token by token with the target's first `exit_layer` layers (None: a quarter of them)."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, exit_layer: int | None = None):
        self.exit_layer = None if exit_layer is None else positive("exit_layer", exit_layer)

    def check(self, target: Target) -> None:
        """ConfigError or UnsupportedModelError unless the target can be left early; to be asked before it runs."""
        if not target.one_pass:
            raise UnsupportedModelError(f"{type(target.model).__name__} cannot be left early; use prompt_lookup")
        self.early(target)

    def early(self, target: Target) -> Target:
        """A view of `target` that runs its first layers only, on the same cache."""
        depth = target.config.num_hidden_layers
        view = copy.copy(target)
        view.model = shallow(target.model, self.exit_layer or max(1, depth // 4))
        view.config = view.model.config.get_text_config(decoder=True)
        view.hidden_layers = ()
        return view

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.context, self.target = context, self.early(context.target)

    def propose(self, count: int) -> Draft:
        s, draws, positions = self.context.sequences, self.context.draws, self.context.sequences.positions(count)
        step, tokens, probs = s.tail(1), s.tail(1)[:, :0], []
        for i in range(count):
            logits = self.target.forward(step).logits
            self.context.stats.draft_calls += 1
            self.target.rollback([n + i + 1 for n in s.cached])
            scores = self.context.processing.scores(logits, s, tokens, first=i)
            step = draws.draw(scores, positions[:, i : i + 1])
            tokens = torch.cat([tokens, step], dim=1)
            probs.append(draws.draft_probs(scores))
            if not self.context.length.keep_drafting(scores):
                break
        self.target.rollback(s.cached)
        return Draft(tokens, None if probs[0] is None else torch.cat(probs, dim=1))

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        pass
