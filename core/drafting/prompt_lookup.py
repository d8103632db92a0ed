"""Drafts what followed the last occurrence of the current n-gram, in the prompt or in the text so far.

Inference with Reference: Lossless Acceleration of Large Language Models (LLMA), 2304.04487, with the prompt and the
output as the reference; the same idea is known as prompt lookup. Exact under any exact rule: the drafts are certain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.drafting.base import Context, Draft
from polyspec.lengths import positive
from polyspec.target import Target


class NgramIndex:
    """Where each n-gram (n = 1 … `max_ngram`) of a growing token list last ended, the list's own end left out.

    frame: n-grams count as the same only if they end as many tokens behind a multiple of `frame`."""

    def __init__(self, max_ngram: int, frame: int = 1):
        self.max_ngram, self.frame = max_ngram, frame
        self.last: dict[tuple[int, ...], int] = {}
        self.seen = 0

    def extend(self, tokens: list[int]) -> None:
        """Take in what `tokens` has beyond what was seen. The last token waits until it has a successor."""
        for end in range(self.seen, len(tokens) - 1):
            for n in range(1, min(self.max_ngram, end + 1) + 1):
                self.last[(end % self.frame, *tokens[end + 1 - n : end + 1])] = end
        self.seen = max(self.seen, len(tokens) - 1)

    def continuation(self, tokens: list[int], count: int) -> list[int] | None:
        """`count` tokens that followed the longest n-gram which ends `tokens`; None if even its last token is new.

        A continuation that reaches the end of the text goes round: what repeats with period p is drafted so.
        """
        phase = (len(tokens) - 1) % self.frame
        for n in range(min(self.max_ngram, len(tokens)), 0, -1):
            end = self.last.get((phase, *tokens[-n:]))
            if end is not None:
                period = len(tokens) - 1 - end
                return [tokens[end + 1 + i % period] for i in range(count)]
        return None


class PromptLookup:
    """Prompt lookup decoding; `max_ngram` is the longest context that is matched.

    Runs on the host, on tokens that the loop has brought there anyway. Rows without a match repeat their last token;
    if no row has one, nothing is drafted.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, max_ngram: int = 3):
        self.max_ngram = positive("max_ngram", max_ngram)

    def check(self, target: Target) -> None:
        pass

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.sequences = context.sequences
        self.indices = [NgramIndex(self.max_ngram, context.target.frame) for _ in range(self.sequences.batch)]

    def propose(self, count: int) -> Draft:
        s, found, rows = self.sequences, False, []
        for tokens, index, running in zip(s.history, self.indices, s.running, strict=True):
            drafted = None
            if running:
                index.extend(tokens)
                drafted = index.continuation(tokens, count)
            found |= drafted is not None
            rows.append(drafted or [tokens[-1]] * count)
        if not found:
            return Draft(s.tail(1)[:, :0])
        return Draft(torch.tensor(rows, device=s.device))

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        pass
