"""The loop for parallel decoding without a drafter: a window of tokens is refined in place, and its settled front is
committed.

Jacobi decoding (2305.10427), speculative Jacobi decoding (2410.01699), its coupled forms (2510.24211) and
Gumbel-Jacobi differ in one thing, how a window token follows from its old value, its old distribution and its new
distribution: that is the `rule`, a function of polyspec.verification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from polyspec.decoding.chain import fewest
from polyspec.drafting.base import Context, Drafter
from polyspec.errors import ConfigError, unknown
from polyspec.target import Target
from polyspec.verification import Verdict
from polyspec.verification.rule import for_target


class Initialisation(Protocol):
    """Tokens for window positions that have not been scored yet. Derive from it: `check` has a default."""

    def check(self, target: Target) -> None:
        """ConfigError if windows cannot be started so on `target`."""

    def __call__(self, context: Context, guess: Tensor, offset: Tensor) -> Tensor:
        """Tokens `[B, W]` for positions `context.sequences.lengths + offset` (`offset [B, W]`, from 0), all of them
        computed though only new positions are used. guess `[B, W]` repeats each row's last window token."""
        ...


class RepeatLeft(Initialisation):
    """The token to the left: on flat image regions, and where nothing better is known."""

    def __call__(self, context: Context, guess: Tensor, offset: Tensor) -> Tensor:
        return guess


class RandomTokens(Initialisation):
    """Uniformly random tokens, as in the paper's first variant; the same in every run that got as far the same way."""

    def __call__(self, context: Context, guess: Tensor, offset: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(sum(context.sequences.lengths))
        return torch.randint(0, context.target.vocab_size, guess.shape, generator=generator).to(guess.device)


class RepeatAbove(Initialisation):
    """The token one image row above, which is committed; the left neighbour in the first row."""

    def check(self, target: Target) -> None:
        if target.row_width is None:
            raise ConfigError("init='above' needs a target whose tokens form image rows; use 'left' or 'random'")

    def __call__(self, context: Context, guess: Tensor, offset: Tensor) -> Tensor:
        s = context.sequences
        assert context.target.row_width is not None
        above = s.length_tensor[:, None] + offset - context.target.row_width
        known = (above >= s.prompt_length) & (above < s.length_tensor[:, None])
        return torch.where(known, s.tokens.gather(1, above.clamp(0, s.limit)), guess)


INITIALISATIONS: dict[str, type[Initialisation]] = {"left": RepeatLeft, "above": RepeatAbove, "random": RandomTokens}


class Jacobi:
    """Refine a window of W tokens until its front settles; W is `context.length`'s answer each round.

    rule: `(x [B, W], q [B, W, V], p [B, W+1, V], …) -> (y [B, W+1], kept [B, W])`; row b commits y up to and including
    its first token that was not kept. init: where new window positions start, an Initialisation or its name.
    """

    def __init__(self, rule: Callable[..., tuple[Tensor, Tensor]], init: Initialisation | str = "left"):
        if isinstance(init, str):
            if init not in INITIALISATIONS:
                raise unknown("init", init, INITIALISATIONS)
            init = INITIALISATIONS[init]()
        self.rule = rule
        self.init = init

    def check(self, target: Target) -> None:
        """ConfigError if windows cannot be started on `target` as asked, UnsupportedModelError if the rule needs
        something that it lacks."""
        self.init.check(target)
        for_target(self.rule, target)

    def run(self, context: Context, drafter: Drafter) -> None:
        """Generate until every row of `context.sequences` has stopped."""
        target, sequences, stats, draws = context.target, context.sequences, context.stats, context.draws
        rule = for_target(self.rule, target)
        context.length.begin(context)
        # The window as the last forward left it: y (its first column the last committed token), and how far to shift.
        y, p, shift = sequences.tail(1), None, torch.zeros(sequences.batch, dtype=torch.long, device=sequences.device)
        while not sequences.finished:
            width = max(0, min(context.length.next(), sequences.remaining - 1))
            with stats.timed("draft"):
                x, q = self.slide(context, y, p, shift, width)
            with stats.timed("target"):
                output = target.forward(torch.cat([sequences.tail(1), x], dim=1))
            with stats.timed("verify"):
                scores = context.processing.scores(output.logits, sequences, x)
                y, kept, p = draws.refine(rule, x, q, scores, sequences.positions(width + 1))
                shift = kept.long().cumprod(1).sum(1)
                if target.lockstep:  # what a row settled beyond the common cut stays in its window, with q := p
                    shift = fewest(shift, sequences.running_tensor)
                verdict = Verdict(shift, y.gather(1, shift[:, None])[:, 0])
                gained = sequences.commit(x, verdict, scores.amax(-1))
                target.rollback(sequences.cached)
            stats.record(width, gained)
            context.length.observe(width, gained, stats)

    def slide(
        self, context: Context, y: Tensor, p: Tensor | None, shift: Tensor, width: int
    ) -> tuple[Tensor, Tensor | None]:
        """The next window `x [B, width]` and the distributions `q [B, width, V]` it was drawn from (one-hot where new).

        Row b's window moves on by `shift[b] + 1`: what was refined behind the commit point stays, with q := p.
        """
        offset = torch.arange(width, device=y.device).expand(len(y), -1)
        source = offset + shift[:, None] + 1
        last = y.shape[1] - 1
        guess = y.gather(1, source.clamp(max=last))
        fresh = source > last
        x = torch.where(fresh, self.init(context, guess, offset), guess)
        # a prompt's last token need not be one that can be drawn (an image model's begin-of-image, say)
        x = x.clamp(0, context.target.vocab_size - 1)
        if p is None:
            return x, None
        q = p.gather(1, source.clamp(max=last)[..., None].expand(-1, -1, p.shape[-1]))
        fresh = fresh | q[..., 0].isnan()  # behind drafts that the processors rule out nothing could be drawn
        one_hot = fresh[..., None] & (torch.arange(p.shape[-1], device=y.device) == x[..., None])
        return x, torch.where(fresh[..., None], one_hot.to(q.dtype), q)
