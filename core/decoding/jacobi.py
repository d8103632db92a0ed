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

from polyspec.decoding.chain import fewest, of_gained
from polyspec.drafting.base import Context, Draft, Drafter, NoDraft
from polyspec.errors import ConfigError, unknown
from polyspec.target import Target
from polyspec.verification import Verdict
from polyspec.verification.rule import for_target


class Initialisation(Protocol):
    """What window positions that have not been scored yet start from. Derive from it: `check` has a default."""

    renews = False
    """Whether it knows better than the window what follows the last committed token."""

    def check(self, target: Target, drafter: Drafter) -> None:
        """ConfigError if windows cannot be started so on `target`."""

    def __call__(self, context: Context, drafter: Drafter, guess: Tensor, offset: Tensor, refresh: int = 0) -> Draft:
        """Tokens `[B, W]` for positions `context.sequences.lengths + offset` (`offset [B, W]`, from 0), all of them
        computed though only new positions and the first `refresh` are used, and what they were drawn from (None: they are
        certain). guess `[B, W]` repeats each row's last window token."""
        ...


class RepeatLeft(Initialisation):
    """The token to the left: on flat image regions, and where nothing better is known."""

    def __call__(self, context: Context, drafter: Drafter, guess: Tensor, offset: Tensor, refresh: int = 0) -> Draft:
        return Draft(guess)


class RandomTokens(Initialisation):
    """Uniformly random tokens, as in the paper's first variant; the same in every run that got as far the same way."""

    def __call__(self, context: Context, drafter: Drafter, guess: Tensor, offset: Tensor, refresh: int = 0) -> Draft:
        generator = torch.Generator().manual_seed(sum(context.sequences.lengths))
        return Draft(torch.randint(0, context.target.vocab_size, guess.shape, generator=generator).to(guess.device))


class RepeatAbove(Initialisation):
    """The token one image row above, which is committed; the left neighbour in the first row."""

    def check(self, target: Target, drafter: Drafter) -> None:
        if target.row_width is None:
            raise ConfigError("init='above' needs a target whose tokens form image rows; use 'left' or 'random'")

    def __call__(self, context: Context, drafter: Drafter, guess: Tensor, offset: Tensor, refresh: int = 0) -> Draft:
        s = context.sequences
        assert context.target.row_width is not None
        above = s.length_tensor[:, None] + offset - context.target.row_width
        known = (above >= s.prompt_length) & (above < s.length_tensor[:, None])
        return Draft(torch.where(known, s.tokens.gather(1, above.clamp(0, s.limit)), guess))


class FromDrafter(Initialisation):
    """Draws from a drafter, which sees what is committed; where it does not reach, the token to the left. A window then
    begins with real distributions rather than one-hot guesses (after 2606.20543).

    Right behind the commit point it knows better than the window: what stands there was drawn behind a token that has
    just been replaced. So the first positions are redrawn every round."""

    renews = True

    def check(self, target: Target, drafter: Drafter) -> None:
        if isinstance(drafter, NoDraft):
            raise ConfigError("init='drafter' needs heads=…, trained draft heads; without them use 'left' or 'above'")

    def __call__(self, context: Context, drafter: Drafter, guess: Tensor, offset: Tensor, refresh: int = 0) -> Draft:
        # a drafter that goes token by token is not asked for more than every round can use
        count = min(guess.shape[1], guess.shape[1] if hasattr(drafter, "block") else refresh)
        if count == 0:
            return Draft(guess)
        draft = drafter.propose(count)
        rest = guess[:, draft.tokens.shape[1] :]
        tokens = torch.cat([draft.tokens, rest], dim=1)
        if draft.probs is None:
            return Draft(tokens)
        return Draft(tokens, torch.cat([draft.probs, one_hot(rest, draft.probs)], dim=1))


def one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    """Distributions `[B, T, V]` of certain tokens `[B, T]`, in the dtype of `like [.., V]`."""
    return like.new_zeros(*tokens.shape, like.shape[-1]).scatter_(-1, tokens[..., None], 1.0)


INITIALISATIONS: dict[str, type[Initialisation]] = {
    "left": RepeatLeft,
    "above": RepeatAbove,
    "random": RandomTokens,
    "drafter": FromDrafter,
}


class Jacobi:
    """Refine a window of W tokens until its front settles; W is `context.length`'s answer each round.

    rule: `(x [B, W], q [B, W, V], p [B, W+1, V], …) -> (y [B, W+1], kept [B, W])`; row b commits y up to and including
    its first token that was not kept. init: where new window positions start, an Initialisation or its name; refresh: if
    that is a drafter, how many positions behind the last committed token it draws anew every round (None: one, if it goes
    token by token). Exact: a position's token is drawn from what is then called its q, whichever that is.
    """

    def __init__(
        self, rule: Callable[..., tuple[Tensor, Tensor]], init: Initialisation | str = "left", refresh: int | None = None
    ):
        if isinstance(init, str):
            if init not in INITIALISATIONS:
                raise unknown("init", init, INITIALISATIONS)
            init = INITIALISATIONS[init]()
        if refresh is not None and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 0):
            raise ConfigError(f"refresh must be a whole number ≥ 0, or None, got {refresh!r}")
        self.rule, self.init, self.refresh = rule, init, refresh

    def check(self, target: Target, drafter: Drafter) -> None:
        """ConfigError if windows cannot be started on `target` as asked, UnsupportedModelError if the rule needs
        something that it lacks."""
        self.init.check(target, drafter)
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
                x, q = self.slide(context, drafter, y, p, shift, width)
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
                target.rollback(sequences.cached, sequences.running)
            with stats.timed("draft"):
                drafter.observe(*of_gained(output.hidden, shift, gained))
            stats.record(width, gained)
            context.length.observe(width, gained, stats)

    def slide(
        self, context: Context, drafter: Drafter, y: Tensor, p: Tensor | None, shift: Tensor, width: int
    ) -> tuple[Tensor, Tensor | None]:
        """The next window `x [B, width]` and the distributions `q [B, width, V]` it was drawn from.

        Row b's window moves on by `shift[b] + 1`: what was refined behind the commit point stays, with q := p; new
        positions start from `init`. q is None if all of it is certain.
        """
        offset = torch.arange(width, device=y.device).expand(len(y), -1)
        source = offset + shift[:, None] + 1
        last = y.shape[1] - 1
        guess = y.gather(1, source.clamp(max=last))
        # a prompt's last token need not be one that can be drawn (an image model's begin-of-image, say)
        guess = guess.clamp(0, context.target.vocab_size - 1)
        refresh = 0
        if self.init.renews:
            # a block drafter's first guess is no better than the window's, but those at the window's end are
            refresh = int(not hasattr(drafter, "block")) if self.refresh is None else self.refresh
        start = self.init(context, drafter, guess, offset, refresh)
        fresh = (source > last) | (offset < refresh)
        x = torch.where(fresh, start.tokens, guess).clamp(0, context.target.vocab_size - 1)
        if (constraint := context.processing.constraint) is not None:
            begun = context.sequences.length_tensor - context.sequences.prompt_length
            x = constraint.fit(x, begun[:, None] + offset)
        if p is None:
            return x, start.probs  # the first window is all new
        q = p.gather(1, source.clamp(max=last)[..., None].expand(-1, -1, p.shape[-1]))
        new = one_hot(x, q) if start.probs is None else start.probs
        # behind drafts that the processors rule out nothing could be drawn
        return x, torch.where(fresh[..., None], new, torch.where(q[..., :1].isnan(), one_hot(x, q), q))
