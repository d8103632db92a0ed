"""What each head is trained for. All objectives see the same batch and return losses and accuracies by name.

A batch has `tokens [B, T]` long, `lengths [B]`, `prompts [B]` and `hidden`, one `[B, T-1, d]` a target layer; rows are
padded on the right. Only what the target generated is learnt. `layers` are the target's token layers, frozen.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from polyspec.drafting.dflash import DFlashModel
from polyspec.drafting.eagle import EagleModel
from polyspec.drafting.heads import TokenLayers
from polyspec.drafting.medusa import MedusaModel
from polyspec.drafting.multi_token import MultiTokenModel

Batch = dict[str, Any]


class Objective(Protocol):
    """`loss`, which is minimised, and whatever else is worth a log line."""

    last_hidden: bool
    """Whether the batch must end with the target's last hidden state, beside the layers the head itself reads."""

    def __call__(self, model: Any, layers: TokenLayers, batch: Batch) -> dict[str, Tensor]: ...


class DFlashObjective:
    """Cross-entropy on blocks at random anchors (2602.06036, §3.3).

    Each of `anchors` random positions a row plays the last committed token: its block sees the context before it and
    itself, all blocks in one forward under one mask. Position i of a block weighs exp(-(i-1)/decay), as an early error
    wastes what follows; decay defaults to half a block. soft, regression: see `predictions_loss`.
    """

    last_hidden = True

    def __init__(self, anchors: int = 8, decay: float | None = None, soft: bool = True, regression: float = 0.0):
        self.anchors, self.decay, self.soft, self.regression = anchors, decay, soft, regression

    def __call__(self, model: DFlashModel, layers: TokenLayers, batch: Batch) -> dict[str, Tensor]:
        tokens, block = batch["tokens"], model.config.block
        rows, context = tokens.shape[0], tokens.shape[1] - 1
        anchors = random_positions(batch["prompts"] - 1, batch["lengths"] - 1, self.anchors)  # [B, A]
        positions = (anchors[..., None] + torch.arange(block, device=tokens.device)).flatten(1)  # [B, A·N]
        features = model.context(batch["hidden"][:-1])
        kept = model.keys_values(features, torch.arange(context, device=tokens.device)[None])

        def attended(k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            return torch.cat([kept[layer][0], k], dim=2), torch.cat([kept[layer][1], v], dim=2)

        query_anchor = anchors.repeat_interleave(block, dim=1)
        before = torch.arange(context, device=tokens.device) < query_anchor[..., None]
        own = torch.arange(self.anchors, device=tokens.device).repeat_interleave(block)
        mask = torch.cat([before, (own[:, None] == own).expand(rows, -1, -1)], dim=2)[:, None]
        last = rows_at(functional.pad(features, (0, 0, 1, 0)), anchors)  # of the token before the anchor, zero if none
        x = model.queries(layers.embed(tokens.gather(1, anchors)), last).flatten(1, 2)
        out = model(x, positions, mask, attended).unflatten(1, (self.anchors, block))[:, :, 1:]
        weight = torch.exp(-torch.arange(block - 1, device=tokens.device) / (self.decay or block / 2))
        predicted = positions.unflatten(1, (self.anchors, block))[:, :, 1:]
        if model.recurrence is not None:
            before = tokens.gather(1, positions.clamp(max=context)).unflatten(1, (self.anchors, block))[:, :, :-1]
            out = model.along(out, layers.embed(before))
        return predictions_loss(out, predicted, weight, batch, layers, self.soft, self.regression)


class MedusaObjective:
    """Cross-entropy of every head, head k weighing decay^k (2401.10774, eq. 2), at random positions of each row.

    soft, regression: see `predictions_loss`.
    """

    last_hidden = True

    def __init__(self, positions: int = 32, decay: float = 0.8, soft: bool = True, regression: float = 0.0):
        self.positions, self.decay, self.soft, self.regression = positions, decay, soft, regression

    def __call__(self, model: MedusaModel, layers: TokenLayers, batch: Batch) -> dict[str, Tensor]:
        hidden = batch["hidden"][0]
        # h_t with t+1 the last committed token; head k predicts t+1+k
        t = random_positions(batch["prompts"] - 2, batch["lengths"] - 2, self.positions).clamp(min=0)
        out = model(rows_at(hidden, t))
        k = torch.arange(1, model.config.heads + 1, device=t.device)
        predicted = t[..., None] + 1 + k
        return predictions_loss(out, predicted, self.decay ** k.float(), batch, layers, self.soft, self.regression)


class MultiTokenObjective(MedusaObjective):
    """The same for heads of either form (2409.08148)."""

    def __call__(self, model: MultiTokenModel, layers: TokenLayers, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        if model.config.form == "latent":
            return super().__call__(model, layers, batch)  # type: ignore[arg-type]
        t = random_positions(batch["prompts"] - 2, batch["lengths"] - 2, self.positions).clamp(min=0)
        k = torch.arange(1, model.config.heads + 1, device=t.device)
        logits = model(rows_at(batch["hidden"][0], t))
        weight = self.decay ** k.float()
        return logits_loss(logits, t[..., None] + 1 + k, weight, batch, layers, self.soft)


class EagleObjective:
    """SmoothL1 on features + `classification` · soft cross-entropy on tokens (2401.15077, eq. 1-3).

    Input features are disturbed by uniform noise of width `noise` standard deviations, against the errors of predicted
    features. With `steps` > 1 the head also drafts on from `positions` random places a row, as it will in use: its own
    predictions stand in for the features of the tokens drafted so far, the target's features for all before them
    (training-time test, EAGLE-3, 2503.01840, §3.2). Step s weighs decay^(s-1).
    """

    last_hidden = True

    def __init__(
        self, positions: int = 32, classification: float = 0.1, noise: float = 0.1, steps: int = 3, decay: float = 0.8
    ):
        self.positions, self.classification, self.noise = positions, classification, noise
        self.steps, self.decay = steps, decay

    def __call__(self, model: EagleModel, layers: TokenLayers, batch: Batch) -> dict[str, Tensor]:
        *inputs, last = batch["hidden"]
        tokens, width = batch["tokens"], last.shape[1] - 1
        feature = model.features(tuple(h[:, :-1] for h in inputs))
        if self.noise:
            feature = feature + (torch.rand_like(feature) - 0.5) * self.noise * feature.std()
        order = torch.arange(width, device=tokens.device)
        cache, mask = DynamicCache(), (order <= order[:, None])[None, None]
        out = model(layers.embed(tokens[:, 1:-1]), feature, order[None], mask, cache)
        goal, held = last[:, 1:], len(inputs) == 1  # entry j, (f_j, x_{j+1}), predicts f_{j+1}; a fused one is free
        learnt = (order + 1 >= batch["prompts"][:, None] - 1) & (order + 1 < batch["lengths"][:, None] - 1)
        totals = {"loss": distance(out, goal)[learnt].mean() if held else out.new_zeros(())}
        entry = random_positions(batch["prompts"] - 2, batch["lengths"] - 2, self.positions).clamp(0, width - 1)
        visible, predicted = order <= entry[..., None], rows_at(out, entry)
        own = torch.eye(self.positions, dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        for step in range(self.steps):
            if step > 0:
                entry = entry + 1
                visible = torch.cat([visible, own], dim=2)
                drafted = layers.embed(tokens.gather(1, (entry + 1).clamp(max=width)))
                predicted = model(drafted, predicted, entry, visible[:, None], cache)
            at = entry.clamp(max=width - 1)
            inside, there = learnt.gather(1, at) & (entry < width), rows_at(goal, at)
            p, logits = layers.logits(there).float().softmax(-1), layers.logits(predicted).float()
            losses = -self.classification * (p * logits.log_softmax(-1)).sum(-1)
            if held and step > 0:
                losses = losses + distance(predicted, there)
            totals["loss"] = totals["loss"] + self.decay**step * losses[inside].mean()
            totals[f"accuracy_{step + 1}"] = (logits.argmax(-1) == p.argmax(-1))[inside].float().mean()
        return totals


def distance(features: Tensor, goal: Tensor) -> Tensor:
    """SmoothL1 between features `[.., d]`, averaged over d."""
    return functional.smooth_l1_loss(features.float(), goal.float(), reduction="none").mean(-1)


class DistilObjective:
    """`ce` · cross-entropy + KL(p ‖ q), p the target's distribution, for a separate small draft model (distillation as
    in DistillSpec, 2310.08461), at random positions of each row.

    rows: the output layers' rows that a step computes, for large vocabularies: half of them those of the tokens that
    were the most frequent so far, the rest drawn from the others, which they stand for (sampled softmax). None: all.
    """

    last_hidden = True

    def __init__(self, positions: int = 32, ce: float = 0.1, rows: int | None = None):
        self.positions, self.ce, self.rows = positions, ce, rows
        self.counts: Tensor | None = None  # of tokens seen, [V]

    def __call__(self, model: PreTrainedModel, layers: TokenLayers, batch: Batch) -> dict[str, Tensor]:
        tokens, last = batch["tokens"], batch["hidden"][-1]
        decoder, output = model.get_decoder(), model.get_output_embeddings()
        assert output is not None
        hidden = decoder(input_ids=tokens[:, :-1]).last_hidden_state
        at = random_positions(batch["prompts"] - 1, batch["lengths"] - 1, self.positions)
        table, goal, label = output.weight, rows_at(last, at), tokens.gather(1, at + 1)
        share: Tensor | float = 0.0
        if self.rows is None or self.rows >= len(table):
            theirs, own = layers.logits(goal), output(rows_at(hidden, at))
        else:
            kept, share = self.choose(tokens, label, len(table))
            theirs, own = layers.logits(goal, kept), functional.linear(rows_at(hidden, at), table[kept])
            label = torch.searchsorted(kept, label)
        log_q, p = (own.float() + share).log_softmax(-1), (theirs.float() + share).softmax(-1)
        cross = -(p * log_q).sum(-1).mean()  # KL(p ‖ q) up to p's own entropy
        hard = functional.nll_loss(log_q.flatten(0, 1), label.flatten())
        overlap = torch.minimum(p, log_q.exp()).sum(-1).mean()
        return {"loss": cross + self.ce * hard, "ce": hard, "overlap": overlap}

    def choose(self, tokens: Tensor, label: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Ids to compute, ascending `[n]`, and log of how many each stands for. Ids in `label` are among them."""
        assert self.rows is not None
        if self.counts is None:
            self.counts = torch.linspace(1, 0, size, device=tokens.device)  # tokenizers number what is frequent early
        self.counts.index_add_(0, tokens.flatten(), torch.ones(tokens.numel(), device=tokens.device))
        certain = torch.zeros(size, dtype=torch.bool, device=tokens.device)
        certain[self.counts.topk(self.rows // 2).indices] = True
        certain[label.flatten()] = True
        others = (~certain).nonzero()[:, 0]
        drawn = others[torch.randperm(len(others), device=tokens.device)[: max(1, self.rows - size + len(others))]]
        share = torch.zeros(size, device=tokens.device)
        share[drawn] = torch.tensor(len(others) / max(len(drawn), 1), device=tokens.device).log()
        certain[drawn] = True
        kept = certain.nonzero()[:, 0]
        return kept, share[kept]


def random_positions(low: Tensor, high: Tensor, count: int) -> Tensor:
    """`[B, count]` random whole numbers in [low, high) of each row (`[B]`; at least one number is assumed)."""
    span = (high - low).clamp(min=1)[:, None]
    return low[:, None] + (torch.rand(len(low), count, device=low.device) * span).long()


def rows_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """`hidden [B, T, d]` at `positions [B, P]`, `[B, P, d]`."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def labels_at(batch: Batch, positions: Tensor, layers: TokenLayers) -> Tensor:
    """The tokens at `positions [B, ..]` as ids of the head's vocabulary; -100 behind a row's end or outside it."""
    tokens, shape = batch["tokens"], positions.shape
    flat = positions.flatten(1)
    labels = layers.own_ids(tokens.gather(1, flat.clamp(max=tokens.shape[1] - 1)))
    return labels.masked_fill(flat >= batch["lengths"][:, None], -100).view(shape)


def predictions_loss(
    out: Tensor, positions: Tensor, weight: Tensor, batch: Batch, layers: TokenLayers, soft: bool, regression: float
) -> dict[str, Tensor]:
    """Loss of N independent predictions `out [B, A, N, d]` of the tokens at `positions [B, A, N]`, weight `[N]`.

    soft: cross-entropy against the target's whole distribution at each position rather than the token it drew there:
    the same expectation, less noise. regression: weight of SmoothL1 to the hidden state which that distribution was read
    from, as EAGLE's. Accuracies, by place, are against the target's most likely token.
    """
    return logits_loss(layers.logits(out), positions, weight, batch, layers, soft, regression, out)


def goals_at(batch: Batch, positions: Tensor) -> Tensor:
    """The target's last hidden states `[B, A, N, d]` that the tokens at `positions [B, A, N]` were read from."""
    # hidden states are known for all but a row's last token, and position i is predicted from that of i-1
    known, flat = batch["hidden"][-1], positions.flatten(1)
    return rows_at(known, (flat - 1).clamp(max=known.shape[1] - 1)).view(*positions.shape, -1)


def logits_loss(
    logits: Tensor,
    positions: Tensor,
    weight: Tensor,
    batch: Batch,
    layers: TokenLayers,
    soft: bool,
    regression: float = 0.0,
    out: Tensor | None = None,
) -> dict[str, Tensor]:
    """`predictions_loss` of logits `[B, A, N, V_d]`; out `[B, A, N, d]` is for the regression."""
    inside = positions < batch["lengths"][:, None, None]
    goal = goals_at(batch, positions)
    logits, theirs = logits.float(), layers.logits(goal).float()
    if soft:
        losses = functional.cross_entropy(logits.flatten(0, 2), theirs.softmax(-1).flatten(0, 2), reduction="none")
        losses, counted = losses.view(positions.shape), inside
    else:
        labels = labels_at(batch, positions, layers)
        losses = functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
        counted = labels != -100
    if regression:
        assert out is not None
        losses = losses + regression * functional.smooth_l1_loss(out.float(), goal.float(), reduction="none").mean(-1)
    weights = weight * counted
    right = ((logits.argmax(-1) == theirs.argmax(-1)) & inside).sum((0, 1)) / inside.sum((0, 1)).clamp(min=1)
    accuracy = {f"accuracy_{i + 1}": r for i, r in enumerate(right)}
    return {"loss": (losses * weights).sum() / weights.sum().clamp(min=1e-9), **accuracy}
