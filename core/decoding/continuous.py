"""The loop for continuous tokens, drawn by a diffusion head: draft, score, verify, denoise on, commit.

A round drafts N tokens with their whole denoising trajectories, runs the target once over them, and has the rule say
how many tokens stand and after which denoising step the next one goes on with the target's own chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyspec.decoding.chains import Chains, denoise
from polyspec.decoding.prices import prices_of
from polyspec.denoising import Ahead, ContinuousTarget
from polyspec.drafting.continuous import LatentContext, LatentDraft
from polyspec.errors import ConfigError, InputError
from polyspec.lengths import positive
from polyspec.paying import Round, policy_of
from polyspec.verification import LatentVerdict

Trajectory = Callable[[ContinuousTarget, Tensor, LatentDraft], Tensor]


def along_draft(target: ContinuousTarget, conditions: Tensor, draft: LatentDraft) -> Tensor:
    """Target means `[B, N, T, D]` at every point of the draft's own trajectories: one head call."""
    step = torch.arange(len(target.sampler), device=target.device).expand(draft.means.shape[:3])
    return target.means(conditions.unsqueeze(2), draft.points[:, :, :-1], step)


def aligned(target: ContinuousTarget, conditions: Tensor, draft: LatentDraft) -> Tensor:
    """Target means `[B, N, T, D]` along trajectories of its own that share the draft's start and noise: T head calls."""
    x, means = draft.points[:, :, 0], []
    for t in range(len(target.sampler)):
        means.append(target.means(conditions, x, torch.full(x.shape[:2], t, device=x.device)))
        x = means[-1] + (draft.points[:, :, t + 1] - draft.means[:, :, t])
    return torch.stack(means, dim=2)


class Continuous:
    """Speculative decoding of continuous tokens, for ragged batches.

    rule: of polyspec.verification, `(points, means_q, means_p, std, *, generator) -> LatentVerdict`.
    trajectory: where the target's means are taken, `along_draft` or `aligned`. window: denoising steps of the target's own
    chain drafted ahead with its last prediction of the clean token held (2501.05370, section 3.2; exact, 1: none).
    prefill: share of the tokens that the target makes alone at the start.
    Without a drafter and with window 1 this is the plain loop.
    """

    def __init__(
        self,
        rule: Callable[..., LatentVerdict],
        trajectory: Trajectory = along_draft,
        window: int = 1,
        prefill: float = 0.0,
    ):
        if not 0 <= prefill <= 1:
            raise ConfigError(f"prefill must lie in [0, 1], got {prefill}")
        self.rule, self.trajectory, self.prefill = rule, trajectory, prefill
        self.window = positive("window", window)

    def check(self, target: ContinuousTarget, drafter: Any) -> None:
        """ConfigError if something is drafted through a step without noise; what the drafter has against `target`."""
        if drafts(drafter) or self.window > 1:
            target.sampler.check_noise()
        if drafts(drafter):
            drafter.check(target)

    def run(self, context: LatentContext, drafter: Any) -> None:
        """Generate until every row of `context.sequences` has all its tokens."""
        target, sequences, stats, policy = context.target, context.sequences, context.stats, policy_of(context.length)
        self.check(target, drafter)
        target.prefill(context.prompt, sequences.limit)
        policy.begin_latents(
            len(target.sampler), self.window, drafts(drafter), lambda: prices_of(self, context, drafter)
        )
        if drafts(drafter):
            drafter.begin(context)
        ahead = Ahead(target.sampler, self.window)
        while not sequences.finished:
            alone = not drafts(drafter) or min(sequences.lengths) < self.prefill * sequences.limit
            count, window = policy.plan(0 if alone else sequences.remaining - 1)
            with stats.timed("draft"):
                draft = drafter.propose_latents(count) if count else empty(target, sequences.batch)
            with stats.timed("target"):
                conditions = target.forward(torch.cat([sequences.tail(), draft.tokens], dim=1))
            with stats.timed("verify"):
                verdict = self.judge(context, conditions[:, :-1], draft)
                accepted, steps = torch.stack([verdict.accepted, verdict.steps]).tolist()
            with stats.timed("target"):
                rows = [b for b, n in enumerate(sequences.lengths) if n + accepted[b] < sequences.limit]
                chains = Chains.begin(context, conditions, verdict, rows, accepted, steps)
                left = [len(target.sampler) - s for s in chains.steps]
                calls = denoise(context, chains, ahead if window > 1 else None)
                gained = sequences.commit(draft.tokens, accepted, rows, chains.x)
                target.rollback(sequences.lengths)
            if drafts(drafter):
                drafter.observe_latents()
            stats.record(count, gained)
            chance = stats.record_steps(verdict, gained)
            policy.observe_latents(Round(count, window, chance, left, calls))

    def judge(self, context: LatentContext, conditions: Tensor, draft: LatentDraft) -> LatentVerdict:
        """The rule's verdict on `draft`."""
        target, stats = context.target, context.stats
        if draft.tokens.shape[1] == 0:
            means = draft.means
        else:
            means = self.trajectory(target, conditions, draft)
            stats.head_calls += len(target.sampler) if self.trajectory is aligned else 1
        return self.rule(draft.points, draft.means, means, target.sampler.std, generator=context.generator)


def drafts(drafter: Any) -> bool:
    """Whether `drafter` can draft continuous tokens at all."""
    return hasattr(drafter, "propose_latents")


def empty(target: ContinuousTarget, rows: int) -> LatentDraft:
    """A draft of zero tokens: the round is plain decoding."""
    points = torch.zeros(rows, 0, len(target.sampler) + 1, target.dim, device=target.device)
    return LatentDraft(points, points[:, :, 1:])


class Latents:
    """B rows of continuous tokens in one buffer `tokens [B, limit + 1, D]`, of which row b has `lengths[b]`."""

    def __init__(
        self, rows: int, limit: int, dim: int, device: torch.device, emit: Callable[[int], None] | None = None
    ):
        self.tokens = torch.zeros(rows, limit + 1, dim, device=device)
        self.batch, self.limit, self.emit = rows, positive("the number of tokens", limit), emit
        self.lengths = [0] * rows
        self.length_tensor = torch.zeros(rows, dtype=torch.long, device=device)

    @property
    def finished(self) -> bool:
        return self.remaining == 0

    @property
    def remaining(self) -> int:
        """The most tokens any row may still gain."""
        return self.limit - min(self.lengths)

    def slots(self, start: Tensor, width: int) -> Tensor:
        """`[B, width, D]`: what stands in each row's slots from `start [B]` on (slot i holds latent i - 1)."""
        index = (start[:, None] - 1 + torch.arange(width, device=start.device)).clamp(0, self.limit)
        return self.tokens.gather(1, index[..., None].expand(-1, -1, self.tokens.shape[2]))

    def tail(self) -> Tensor:
        """Each row's last latent `[B, 1, D]`."""
        return self.slots(self.length_tensor, 1)

    def commit(self, drafted: Tensor, accepted: list[int], rows: list[int], new: Tensor) -> list[int]:
        """Append each row's accepted drafts (`drafted [B, N, D]`) and, in `rows`, the token `new [R, D]`; returns gains."""
        before = min(self.lengths)
        gains = []
        for b, (n, a) in enumerate(zip(self.lengths, accepted, strict=True)):
            gains.append(min(a + 1, self.limit - n))
            self.lengths[b] = n + gains[b]
        column = self.length_tensor[:, None] + torch.arange(drafted.shape[1], device=drafted.device)
        column = column.clamp(max=self.limit)  # the last column is no token's
        self.tokens.scatter_(1, column[..., None].expand_as(drafted), drafted)
        self.length_tensor = torch.tensor(self.lengths, device=drafted.device)
        index = torch.tensor(rows, device=drafted.device, dtype=torch.long)
        self.tokens[index, self.length_tensor[index] - 1] = new
        if not bool(new.isfinite().all()):
            raise InputError("the target's head gave NaN or infinite latents; check the weights and the dtype")
        for _ in range(min(self.lengths) - before if self.emit is not None else 0):
            self.emit(1)  # type: ignore[misc]
        return gains

    def result(self) -> Tensor:
        """`[B, limit, D]`."""
        return self.tokens[:, : self.limit]
