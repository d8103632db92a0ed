"""A separate, smaller model drafts a chain.

Fast Inference from Transformers via Speculative Decoding, 2211.17192; Accelerating Large Language Model Decoding with
Speculative Sampling, 2302.01318. Same tokenizer as the target; the vocabularies may be padded to different sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polyspec.distributions import fit_vocabulary
from polyspec.drafting.base import Context, Draft
from polyspec.errors import InputError
from polyspec.target import make_target

PADDING = 1024  # vocabularies of siblings differ by padding; a larger difference means another tokenizer


class DraftModel:
    """Drafts token by token with `model`, through the same processors and draws as the target.

    model: any decoder-only transformers model with the target's tokenizer, on any device, in any dtype.
    Raises InputError if the vocabularies differ by more than padding.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, draft_model: PreTrainedModel):
        self.model = draft_model
        self.draft_target = make_target(draft_model)

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        ours, theirs = self.draft_target.vocab_size, context.target.vocab_size
        if abs(ours - theirs) > PADDING:
            raise InputError(
                f"the draft model has a vocabulary of {ours} tokens, the target {theirs}: they must share one "
                "tokenizer; choose a draft model of the target's family"
            )
        self.context, self.vocab_size, self.own_vocab_size = context, theirs, ours
        self.draft_target = make_target(self.model, context.target.guidance)
        s = context.sequences
        prompt = s.tokens[:, : s.prompt_length]
        mask = (torch.arange(s.prompt_length, device=s.device) >= s.pad_tensor[:, None]).long()
        self.draft_target.prefill(
            self.to_own(prompt), mask.to(self.draft_target.device), capacity=s.limit + 32
        )

    def to_own(self, tokens: Tensor) -> Tensor:
        """Tokens on this model's device, ids beyond its vocabulary (padding the target has and we lack) clipped."""
        return tokens.to(self.draft_target.device).clamp(max=self.own_vocab_size - 1)

    def propose(self, count: int) -> Draft:
        s, draws = self.context.sequences, self.context.draws
        target = self.draft_target
        # Two tokens are fed first: after a fully accepted round the last draft has not been through this model yet.
        # Where it has, its slot is written again with the same values.
        target.rollback(s.cached)
        again = min(1, *target.cache_lengths)
        target.rollback([n - again for n in s.cached])
        step, positions = s.tail(1 + again), s.positions(count)
        tokens, probs = s.tail(1)[:, :0], []
        for i in range(count):
            logits = target.forward(self.to_own(step)).logits[:, -1:].to(s.device)
            self.context.stats.draft_calls += 1
            target.rollback([n + i + 1 for n in s.cached])
            scores = self.context.processing.scores(fit_vocabulary(logits, self.vocab_size), s, tokens, first=i)
            step = draws.draw(scores, positions[:, i : i + 1])
            tokens = torch.cat([tokens, step], dim=1)
            probs.append(draws.draft_probs(scores))
            if not self.context.length.keep_drafting(scores):
                break
        return Draft(tokens, None if probs[0] is None else torch.cat(probs, dim=1))

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        pass
