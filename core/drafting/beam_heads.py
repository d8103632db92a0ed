"""Drafts for constrained beam search from heads on the target: one pass a request, no second model.

As in NEZHA, 2511.18793, but verified by the target: with three or four tokens an item, heads that predict all of them from
one hidden state, the prompt's last, draft every level at once, as independent distributions that the trie joins. The first
round is plain, since it brings the hidden states; all later rounds draw on the same distributions.

Medusa heads (2401.10774) and the block drafter (DFlash, 2602.06036) will do: both are trained to predict the next tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.decoding.beam import BeamContext, DraftLevel
from polyspec.decoding.search import Beams, Search
from polyspec.drafting.beam import LevelBeams, ModelBeams
from polyspec.drafting.dflash import DFlashModel
from polyspec.drafting.heads import HeadModel, TokenLayers, kind_of, load_heads
from polyspec.drafting.medusa import MedusaModel
from polyspec.errors import ConfigError, unknown
from polyspec.target import Target


def medusa_logits(model: Any, layers: TokenLayers, search: Search, hidden: tuple[Tensor, ...]) -> Tensor:
    """Logits `[B, K, V_d]` of the tokens 2 … K+1 behind the prompts, from K heads."""
    return layers.logits(model(hidden[0][:, search.prompts.shape[1] - 1]))


def block_logits(model: Any, layers: TokenLayers, search: Search, hidden: tuple[Tensor, ...]) -> Tensor:
    """Logits `[B, N-2, V_d]` of the tokens 2 … N-1 behind the prompts, from a block of N."""
    root, device = search.prompts.shape[1] - 1, search.prompts.device
    context = model.context(tuple(h[:, :root] for h in hidden))
    known = model.keys_values(context, torch.arange(root, device=device)[None])
    base = torch.tensor(search.lengths, device=device)[:, None] - 1
    before = functional.pad(context, (0, 0, 1, 0)).gather(1, base[..., None].expand(-1, -1, context.shape[2]))[:, 0]
    block = model.queries(layers.embed(search.prompts[:, -1]), before)
    size = block.shape[1]
    mask = functional.pad(torch.arange(root, device=device) < base, (0, size), value=True)[:, None, None, :]

    def attended(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return torch.cat([known[layer][0], keys], dim=2), torch.cat([known[layer][1], values], dim=2)

    out = model(block, base + torch.arange(size, device=device), mask, attended)
    return layers.logits(out[:, 2:])


KINDS: dict[str, tuple[type[HeadModel], Callable[..., Tensor]]] = {
    MedusaModel.config_class.model_type: (MedusaModel, medusa_logits),
    DFlashModel.config_class.model_type: (DFlashModel, block_logits),
}


class HeadBeams(LevelBeams):
    """Drafts with `heads`, a MedusaModel or DFlashModel or its folder; they must reach an item's last token."""

    def __init__(self, heads: HeadModel | str | PathLike[str], spread: float = 2.0, temperature: float | None = None):
        super().__init__(spread, temperature)
        kind = kind_of(heads)
        if kind not in KINDS:
            raise unknown("kind of heads", kind, KINDS)
        model_class, self.logits_of = KINDS[kind]
        self.model: Any = load_heads(model_class, heads)
        if getattr(self.model.config, "recurrent", 0):
            raise ConfigError(
                "beams join places that are predicted independently, these heads carry a state from place to place; train "
                "some with train.head.recurrent=0"
            )
        self.hidden_layers = tuple(self.model.config.target_layers or ())

    def check(self, target: Target) -> None:
        self.model.check(target)

    def begin(self, context: BeamContext) -> None:
        super().begin(context)
        target = context.target
        self.model.to(device=target.device, dtype=target.model.dtype)
        self.layers, self.logits = TokenLayers(target, self.model.vocab_map, self.model.config.even_embeddings), None

    def observe(self, hidden: tuple[Tensor, ...]) -> None:
        if self.logits is not None:
            return
        self.context.stats.draft_calls += 1
        with torch.no_grad():
            self.logits = self.layers.spread(self.logits_of(self.model, self.layers, self.search, hidden))
        if self.logits.shape[1] < self.search.trie.depth - 1:
            raise ConfigError(
                f"these heads reach {self.logits.shape[1] + 1} tokens ahead, items have {self.search.trie.depth}; train "
                "some that reach further"
            )

    def keep(self, index: Tensor, rows: list[int]) -> None:
        super().keep(index, rows)
        self.logits = None if self.logits is None else self.logits[index]

    def propose_levels(self, count: int) -> list[DraftLevel]:
        return [] if self.logits is None else super().propose_levels(count)

    def first_logits(self) -> Tensor:
        return self.next_logits(self.search.beams, self.search.beams.node, -1)

    def next_logits(self, beams: Beams, under: Tensor, ahead: int) -> Tensor:
        assert self.logits is not None
        level = torch.tensor(self.search.levels, device=under.device) + ahead  # the first logits are for level 1
        rows = torch.arange(len(level), device=under.device)
        now = self.logits[rows, level.clamp(0, self.logits.shape[1] - 1)]
        return now[:, None].expand(-1, beams.node.shape[1], -1)


def draft_beams(
    *, draft_model: Any = None, heads: Any = None, spread: float = 2.0, temperature: float | None = None
) -> LevelBeams:
    """The drafter for what the user handed over, one of both. ConfigError for both or none."""
    if draft_model is not None and heads is None:
        return ModelBeams(draft_model, spread, temperature)
    if heads is not None and draft_model is None:
        return HeadBeams(heads, spread, temperature)
    raise ConfigError("give draft_model=… or heads=…, one of them, to draft with")
