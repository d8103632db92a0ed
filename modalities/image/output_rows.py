"""A vocabulary's image tokens, from the rows of an output layer that also knows text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class OutputRows:
    """Some rows of a linear output layer, in an order of their own; stretches of consecutive ones are not copied."""

    def __init__(self, layer: nn.Linear, rows: Sequence[int]):
        starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
        ends = [*starts[1:], len(rows)]
        weight = layer.weight.detach()
        if len(starts) <= 16:
            self.parts = [weight[rows[a] : rows[b - 1] + 1] for a, b in zip(starts, ends, strict=True)]
        else:
            self.parts = [weight[torch.tensor(rows, device=weight.device)]]

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.cat([linear(hidden, part) for part in self.parts], dim=-1)
