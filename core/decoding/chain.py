"""The loop for drafts that are one chain: draft, score, verify, commit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyspec.decoding.sequences import Sequences
from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.target import Target
from polyspec.verification import Verdict
from polyspec.verification.rule import for_target


class Chain:
    """Speculative decoding with a chain of drafts (2211.17192, Algorithm 1), for ragged batches.

    verifier: an acceptance rule of polyspec.verification. How many tokens to draft is up to `context.length`.
    """

    def __init__(self, verifier: Callable[..., Verdict]):
        self.verifier = verifier

    def check(self, target: Target, drafter: Drafter) -> None:
        """UnsupportedModelError if the verifier needs something that `target` lacks."""
        for_target(self.verifier, target)

    def run(self, context: Context, drafter: Drafter) -> None:
        """Generate until every row of `context.sequences` has stopped."""
        target, sequences, stats = context.target, context.sequences, context.stats
        verifier = for_target(self.verifier, target)
        context.length.begin(context)
        while not sequences.finished:
            count = min(context.length.next(), sequences.remaining - 1)
            with stats.timed("draft"):
                draft = drafter.propose(count) if count > 0 else no_draft(sequences)
            with stats.timed("target"):
                output = target.forward(torch.cat([sequences.tail(1), draft.tokens], dim=1))
            with stats.timed("verify"):
                scores = context.processing.scores(output.logits, sequences, draft.tokens)
                positions = sequences.positions(draft.tokens.shape[1] + 1)
                verdict = context.draws.verify(verifier, draft, scores, positions)
                if target.lockstep:
                    verdict = in_lockstep(verdict, draft.tokens, sequences.running_tensor)
                gained = sequences.commit(draft.tokens, verdict, scores.amax(-1))
                target.rollback(sequences.cached, sequences.running)
            with stats.timed("draft"):
                drafter.observe(*of_gained(output.hidden, verdict.accepted, gained))
            stats.record(draft.tokens.shape[1], gained)
            context.length.observe(draft.tokens.shape[1], gained, stats)


def of_gained(hidden: tuple[Tensor, ...], accepted: Tensor, gained: list[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a drafter needs to see of a round: the part that may have been committed."""
    width = max(gained)
    return tuple(h[:, :width] for h in hidden), accepted.clamp(max=width - 1)


def no_draft(sequences: Sequences) -> Draft:
    """A draft of zero tokens: the round is plain decoding."""
    return Draft(sequences.tail(1)[:, :0])


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
