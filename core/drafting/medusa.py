"""Heads on the target's last hidden state each predict one of the next tokens.

Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, 2401.10774, §2.1. With h_t the last
hidden state of the last token that has been through the target, whose output layer W_U gives token t+1, head k predicts
token t+1+k, independently of the others:

    q^(k) = softmax(W_U (h_t + SiLU(W_1^(k) h_t + b^(k)))),    k = 1 … K,    W_1^(k) = 0 at the start.

The paper gives every head an output matrix of its own, started from W_U; here W_U is shared and frozen, so a head is
one d×d matrix. Exact under any exact rule (the paper's own rule, typical acceptance, is a heuristic).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization

from polyspec.drafting.base import Context, Draft
from polyspec.drafting.heads import HeadConfig, HeadDrafter, HeadModel
from polyspec.errors import ConfigError
from polyspec.laid_out import laid_out, using
from polyspec.target import Target


class MedusaConfig(HeadConfig):
    """`heads` is K."""

    model_type = "polyspec_medusa"
    heads: int = 4


class MedusaModel(HeadModel):
    """K residual blocks side by side. `for_target(model, heads=…)`."""

    config_class = MedusaConfig
    config: MedusaConfig

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        width = config.target_hidden_size
        self.blocks = nn.Linear(width, config.heads * width)
        self.post_init()

    @classmethod
    def default_sizes(cls, target: Target, sizes: dict[str, Any]) -> dict[str, Any]:
        if sizes.get("heads", 4) < 1:
            raise ConfigError(f"heads must be ≥ 1, got {sizes['heads']}")
        return {**super().default_sizes(target, sizes), "target_layers": [target.config.num_hidden_layers]}

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.blocks:
            initialization.zeros_(self.blocks.weight)
            initialization.zeros_(self.blocks.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Last hidden states `[.., d]` to what the target's output layer reads for each head, `[.., K, d]`."""
        update = self.blocks(hidden).unflatten(-1, (self.config.heads, -1))
        return hidden.unsqueeze(-2) + functional.silu(update)


class Medusa(HeadDrafter[MedusaModel]):
    """Drafts at most K tokens from one hidden state with `heads`, a MedusaModel or its folder."""

    kind = MedusaModel

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.bind(context)
        self.linears = laid_out(self.model)
        (last,) = self.prompt_hidden(hidden)
        self.lengths = self.target.cache_lengths
        self.hidden = last.new_zeros(last.shape[0], last.shape[2])
        if last.shape[1]:
            self.hidden = take(last, torch.tensor(self.lengths, device=last.device) - 1)

    def block(self, count: int) -> Tensor:
        """Logits `[B, count, V]` of the next positions, fewer if there are fewer heads."""
        self.context.stats.draft_calls += 1
        with using(self.linears):
            ahead = self.model(self.hidden)
        return self.logits(ahead[:, :count])

    def propose(self, count: int) -> Draft:
        return self.draw(self.block(count))

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        self.hidden = take(hidden[0], self.streams(accepted))


def take(hidden: Tensor, index: Tensor) -> Tensor:
    """`hidden [S, T, d]` at one position `index [S]` a row, `[S, d]`; outside the row the nearest one."""
    index = index.clamp(0, hidden.shape[1] - 1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]
