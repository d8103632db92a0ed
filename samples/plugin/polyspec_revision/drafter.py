"""Input-guided aggressive decoding, 2205.10350: a revised text mostly repeats its source, so the source is the draft."""

import torch

from polyspec.drafting import Draft
from polyspec.errors import ConfigError
from polyspec.lengths import positive


class Source:
    """Drafts what follows, in the row's source, the last tokens of its output: as many as match, `max_ngram` at most."""

    hidden_layers, sources = (), None

    def __init__(self, max_ngram):
        self.max_ngram = positive("max_ngram", max_ngram)

    def check(self, target):
        if self.sources is None:
            raise ConfigError("recipe 'aggressive' drafts from a source: use polyspec.pipeline('revision')")

    def begin(self, context, hidden):
        self.sequences = context.sequences

    def propose(self, count):
        s = self.sequences
        rows = [self.continuation(source, own)[:count] for source, own in zip(self.sources, s.history, strict=True)]
        width = max(map(len, rows))  # rows that have nothing to draft, or less, are filled up with anything
        return Draft(torch.tensor([row + [0] * (width - len(row)) for row in rows], device=s.device).long())

    def continuation(self, source, tokens):
        if len(tokens) == 1:  # the decoder's start token alone
            return source
        lengths = range(min(self.max_ngram, len(tokens)), 0, -1)
        ends = ((n, end) for n in lengths for end in range(len(source) - 1, n - 1, -1))
        return next((source[end:] for n, end in ends if source[end - n : end] == tokens[-n:]), [])

    def observe(self, hidden, accepted):
        pass
