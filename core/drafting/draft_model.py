"""A separate, smaller model drafts a chain, or a tree level by level.

Fast Inference from Transformers via Speculative Decoding, 2211.17192; Accelerating Large Language Model Decoding with
Speculative Sampling, 2302.01318. Same tokenizer as the target; the vocabularies may be padded to different sizes.
"""

from __future__ import annotations

import sys
from functools import cache
from os import PathLike
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from polyspec.distributions import fit_vocabulary
from polyspec.drafting.base import Context, Draft
from polyspec.drafting.lean_llama import draft_target
from polyspec.drafting.medusa import take
from polyspec.errors import ConfigError, InputError
from polyspec.pipelines import load
from polyspec.target import Target, make_target
from polyspec.trees import Tree

PADDING = 1024  # vocabularies of siblings differ by padding; a larger difference means another tokenizer


@cache
def load_draft_model(source: str) -> PreTrainedModel:
    """The model in a folder or on the hub, in the precision it was saved in; CheckpointError if it cannot be loaded."""
    config = load(AutoConfig.from_pretrained, source)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, architecture, AutoModelForCausalLM)
    return load(kind.from_pretrained, source, dtype="auto").eval()


def encoder_width(config: Any) -> int:
    """How many features the encoder of an encoder-decoder model gives."""
    return getattr(config, "encoder_config", config).hidden_size


class DraftModel:
    """Drafts token by token with `draft_model`, through the same processors and draws as the target.

    draft_model: any transformers model with the target's tokenizer, on any device, in any dtype; or a folder or hub id,
    loaded once, onto the target's device. An encoder-decoder model shares the target's encoder outputs.
    Raises CheckpointError if it cannot be loaded, InputError if the vocabularies differ by more than padding.
    """

    hidden_layers: tuple[int, ...] = ()
    reach = sys.maxsize
    vocabulary: Tensor | None = None
    copies = 1
    """Prompts that this model drafts from for every row, in one batch: copy k of row b is its stream kB + b."""

    def __init__(self, draft_model: PreTrainedModel | str | PathLike[str]):
        self.loaded = isinstance(draft_model, str | PathLike)
        self.model = load_draft_model(str(draft_model)) if isinstance(draft_model, str | PathLike) else draft_model
        if not isinstance(self.model, PreTrainedModel):
            raise ConfigError(
                f"draft_model must be a transformers model or the folder of one, got {type(draft_model).__name__}"
            )
        self.draft_target = make_target(self.model)

    def check(self, target: Target) -> None:
        """InputError unless both models have one vocabulary, up to padding, and one encoder if it needs any."""
        ours, theirs = self.draft_target.vocab_size, target.vocab_size
        if abs(ours - theirs) > PADDING:
            raise InputError(
                f"the draft model has a vocabulary of {ours} tokens, the target {theirs}: they must share one "
                "tokenizer; choose a draft model of the target's family"
            )
        ours, theirs = self.model.config, target.model.config
        if not ours.is_encoder_decoder:
            return
        if not theirs.is_encoder_decoder or encoder_width(ours) != encoder_width(theirs):
            raise InputError(
                f"an encoder-decoder draft model shares the target's encoder, which must give {encoder_width(ours)} "
                "features; use one distilled with the target's encoder, or a decoder-only draft model"
            )

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.context = context
        self.vocab_size, self.own_size = context.target.vocab_size, self.draft_target.input_size
        if self.loaded:
            self.model.to(context.target.device)  # type: ignore[arg-type]
        self.draft_target = draft_target(self.model, context.target.guidance)
        s = context.sequences
        context.stats.draft_ratio = self.model.num_parameters() / context.target.model.num_parameters()
        tokens, mask, extra = self.prompts()
        longer = max(0, tokens.shape[1] - s.prompt_length)
        self.draft_target.prefill(
            self.to_own(tokens), mask.to(self.draft_target.device), capacity=s.limit + longer + 32, **extra
        )
        # how many tokens more than the target each stream has in its cache, as its prompt may be another
        streams = zip(self.draft_target.cache_lengths, s.cached * self.copies, strict=False)
        self.ahead = [own - n for own, n in streams]
        self.fed = s.cached  # how many of each row's tokens this model has been through, drafts included

    def prompts(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """What this model drafts from: tokens and mask `[copies · B, P]`, and keyword arguments of prefill. A prompt may
        differ from the target's, but for its last token."""
        s = self.context.sequences
        mask = (torch.arange(s.prompt_length, device=s.device) >= s.pad_tensor[:, None]).long()
        return s.tokens[:, : s.prompt_length], mask, self.encoded()

    def own(self, lengths: list[int]) -> list[int]:
        """The length of every stream's cache where the target's rows have `lengths`."""
        return [n + more for n, more in zip(lengths * self.copies, self.ahead, strict=True)]

    def mix(self, logits: Tensor) -> Tensor:
        """Logits of all copies `[copies · B, T, V]` to those that tokens are drawn from `[B, T, V]`."""
        return logits

    def encoded(self) -> dict[str, Any]:
        """What an encoder-decoder model attends to: the target's encoder outputs, as it has none of its own."""
        if not self.model.config.is_encoder_decoder:
            return {}
        return {k: v for k, v in self.context.target.extra.items() if k in ("encoder_outputs", "attention_mask")}

    def to_own(self, tokens: Tensor) -> Tensor:
        """Tokens on this model's device, ids beyond its vocabulary (padding the target has and we lack) clipped."""
        return tokens.to(self.draft_target.device).clamp(0, self.own_size - 1)

    def root(self) -> Tensor:
        s, target = self.context.sequences, self.draft_target
        # What this model has not been through: the last committed token, what was accepted of a tree, after a fully
        # accepted chain the last draft, and whatever was decoded plainly meanwhile. Rows that lack less write some slots
        # again, with equal values; where they hold too few for that (an unconditional stream may), some behind the end.
        missing = max(n + 1 - min(n, f) for n, f in zip(s.cached, self.fed, strict=True))
        target.rollback(self.own(s.cached))
        again = [min(missing - 1, *target.cache_lengths[row :: s.batch]) for row in range(s.batch)]
        start = [n - a for n, a in zip(s.cached, again, strict=True)]
        target.rollback(self.own(start))
        columns = (torch.tensor(start, device=s.device) + s.pad_tensor)[:, None] + torch.arange(
            missing, device=s.device
        )
        logits = self.logits(s.tokens.gather(1, columns.clamp(0, s.limit)))
        self.fed = [n + 1 for n in s.cached]
        target.rollback(self.own(self.fed))
        return self.mix(take(logits, torch.tensor(again * self.copies, device=s.device))[:, None])

    def level(self, tokens: Tensor, tree: Tree) -> Tensor:
        logits = self.mix(self.logits(tokens, tree))
        self.draft_target.rollback(self.own([n + tree.size for n in self.fed]))
        return logits

    def rollback(self) -> None:
        self.draft_target.rollback(self.own(self.fed))

    def logits(self, tokens: Tensor, tree: Tree | None = None) -> Tensor:
        """Logits `[copies · B, T, V]` over the target's vocabulary after T more tokens; with a tree, its last T nodes."""
        self.context.stats.draft_calls += 1
        logits = self.draft_target.forward(self.to_own(tokens).repeat(self.copies, 1), tree).logits
        return fit_vocabulary(logits.to(tokens.device), self.vocab_size)

    def propose(self, count: int) -> Draft:
        s, draws, positions = self.context.sequences, self.context.draws, self.context.sequences.positions(count)
        logits, tokens, probs = self.root(), s.tail(1)[:, :0], []
        for i in range(count):
            if i > 0:
                logits = self.mix(self.logits(tokens[:, -1:]))
                self.draft_target.rollback(self.own([n + i + 1 for n in s.cached]))
            scores = self.context.processing.scores(logits, s, tokens, first=i)
            step = draws.draw(scores, positions[:, i : i + 1]).clamp_min(0)  # -1 where the scores are NaN: never kept
            tokens = torch.cat([tokens, step], dim=1)
            probs.append(draws.draft_probs(scores))
            if not self.context.length.keep_drafting(scores):
                break
        self.fed = [n + tokens.shape[1] for n in s.cached]
        return Draft(tokens, None if probs[0] is None else torch.cat(probs, dim=1))

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        pass
