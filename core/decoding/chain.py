"""The loop for drafts that are one chain: draft, score, verify, commit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Draws
from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.target import Target
from polyspec.verification import Verdict
from polyspec.verification.rule import for_target


class Chain:
    """Speculative decoding with a chain of drafts (2211.17192, Algorithm 1), for ragged batches.

    verifier: an acceptance rule of polyspec.verification. How many tokens to draft is up to `context.length`. On a target
    whose steps have several tokens, drafts and what is committed are whole steps, and so is what the stats count.
    """

    one_pass = False  # nothing but chains goes to the target

    def __init__(self, verifier: Callable[..., Verdict]):
        self.verifier = verifier

    def check(self, target: Target, drafter: Drafter) -> None:
        """UnsupportedModelError if the verifier needs something that `target` lacks."""
        for_target(self.verifier, target)

    def run(self, context: Context, drafter: Drafter) -> None:
        """Generate until every row of `context.sequences` has stopped."""
        target, sequences, stats, step = context.target, context.sequences, context.stats, context.target.step
        verifier = for_target(self.verifier, target)
        context.length.begin(context)
        again = 0  # committed tokens that the target has not seen but its last: those a step ended with
        while not sequences.finished:
            count = min(context.length.next(), sequences.remaining // step - 1) * step
            with stats.timed("draft"):
                draft = whole_steps(drafter.propose(count), step) if count > 0 else no_draft(sequences)
                tokens = draft.tokens if step == 1 else torch.cat([draft.tokens, filler(sequences, step)], dim=1)
            with stats.timed("target"):
                width, checked = tokens.shape[1] + 1, draft.tokens.shape[1] + 1
                output = target.forward(torch.cat([sequences.tail(1 + again), tokens], dim=1), wanted=width)
            with stats.timed("verify"):
                scores = context.processing.scores(output.logits, sequences, tokens)
                positions = sequences.positions(width)
                verdict = context.draws.verify(verifier, draft, scores[:, :checked], positions[:, :checked])
                if target.lockstep:
                    verdict = in_lockstep(verdict, draft.tokens, sequences.running_tensor)
                if step > 1:
                    tokens, verdict = to_the_step(tokens, verdict, scores, positions, context.draws, step)
                gained = sequences.commit(tokens, verdict, scores.amax(-1))
                again = step - 1
                target.rollback([n - again for n in sequences.cached], sequences.running)
            with stats.timed("draft"):
                drafter.observe(*of_gained(output.hidden, verdict.accepted, gained))
            proposed, gained = draft.tokens.shape[1] // step, [-(-g // step) for g in gained]
            stats.record(proposed, gained)
            context.length.observe(proposed, gained, stats)


def of_gained(hidden: tuple[Tensor, ...], accepted: Tensor, gained: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a drafter needs to see of a round: the part that may have been committed."""
    width = max(gained)
    return tuple(h[:, :width] for h in hidden), accepted.clamp(max=width - 1)


def no_draft(sequences: Sequences) -> Draft:
    """A draft of zero tokens: the round is plain decoding."""
    return Draft(sequences.tail(1)[:, :0])


def whole_steps(draft: Draft, step: int) -> Draft:
    """What `draft` has of whole steps."""
    whole = draft.tokens.shape[1] // step * step
    if whole == draft.tokens.shape[1]:
        return draft
    return Draft(draft.tokens[:, :whole], None if draft.probs is None else draft.probs[:, :whole])


def filler(sequences: Sequences, step: int) -> Tensor:
    """`[B, step - 1]` tokens in the place of a step's first ones: its last does not depend on them."""
    return sequences.tail(1).expand(-1, step - 1)


def to_the_step(
    tokens: Tensor, verdict: Verdict, scores: Tensor, positions: Tensor, draws: Draws, step: int
) -> tuple[Tensor, Verdict]:
    """The verdict on drafts `tokens [B, N]` carried to the end of the step it stops in: what follows the verdict's token
    there is drawn from the target's own `scores [B, N+1, V]`, which no token of the step has a part in."""
    width = scores.shape[1]
    begin = verdict.accepted // step * step
    within = begin[:, None] + torch.arange(step, device=tokens.device)
    own = draws.draw(
        scores.gather(1, within[..., None].expand(-1, -1, scores.shape[2])), positions.gather(1, within)
    )
    own = own.scatter(1, (verdict.accepted - begin)[:, None], verdict.next_token[:, None])
    column = torch.arange(width, device=tokens.device)
    drawn = own.gather(1, (column - begin[:, None]).clamp(0, step - 1))
    padded = torch.nn.functional.pad(tokens, (0, 1))
    tokens = torch.where(column < verdict.accepted[:, None], padded, drawn)
    return tokens[:, :-1], Verdict(begin + step - 1, own[:, -1])


def fewest(accepted: Tensor, running: Tensor) -> Tensor:
    """For every row `[B]`, the fewest tokens that any running row accepted."""
    return accepted.masked_fill(~running, torch.iinfo(accepted.dtype).max).min().expand_as(accepted)


def in_lockstep(verdict: Verdict, drafted: Tensor, running: Tensor) -> Verdict:
    """The same number of tokens for every running row: the fewest any of them accepted.

    Exact: a row cut short after m tokens emits its accepted draft m as the next token, which is what a shorter draft
    would have done, and where the cut falls depends on the other rows alone.
    """
    if drafted.shape[1] == 0:
        return verdict
    cut = fewest(verdict.accepted, running)
    at_cut = drafted.gather(1, cut.clamp(max=drafted.shape[1] - 1)[:, None])[:, 0]
    next_token = torch.where(verdict.accepted > cut, at_cut, verdict.next_token)
    return Verdict(torch.minimum(verdict.accepted, cut), next_token)
