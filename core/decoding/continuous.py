"""The loop for continuous tokens, drawn by a diffusion head: draft, score, verify, denoise on, commit.

A round drafts N tokens with their whole denoising trajectories, runs the target once over them, and has the rule say
how many tokens stand and after which denoising step the next one goes on with the target's own chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyspec.denoising import ContinuousTarget, gaussian_noise
from polyspec.drafting.continuous import LatentContext, LatentDraft
from polyspec.errors import ConfigError, InputError
from polyspec.lengths import positive
from polyspec.verification import LatentVerdict, reflection_coupling

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
        target, sequences, stats = context.target, context.sequences, context.stats
        self.check(target, drafter)
        target.prefill(context.prompt, sequences.limit)
        if drafts(drafter):
            drafter.begin(context)
        context.length.begin(context)  # type: ignore[arg-type]
        while not sequences.finished:
            count = self.count(context, drafter)
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
                denoise(context, chains, self.window)
                gained = sequences.commit(draft.tokens, accepted, rows, chains.x)
                target.rollback(sequences.lengths)
            if drafts(drafter):
                drafter.observe_latents()
            stats.record_steps(verdict.kept, accepted, gained)
            stats.record(draft.tokens.shape[1], gained)
            if drafts(drafter):
                context.length.observe(draft.tokens.shape[1], gained, stats)

    def count(self, context: LatentContext, drafter: Any) -> int:
        """How many tokens the coming round drafts."""
        alone = min(context.sequences.lengths) < self.prefill * context.sequences.limit
        if alone or not drafts(drafter):
            return 0
        return min(context.length.next(), context.sequences.remaining - 1)

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


@dataclass(slots=True)
class Chains:
    """R unfinished denoising chains: conditions `[R, ...]`, points x `[R, D]`, steps taken, noise `[R, T, D]` to come."""

    condition: Tensor
    x: Tensor
    steps: list[int]
    noise: Tensor

    @classmethod
    def begin(
        cls,
        context: LatentContext,
        conditions: Tensor,
        verdict: LatentVerdict,
        rows: list[int],
        accepted: list[int],
        steps: list[int],
    ) -> Chains:
        """The next token of each of `rows`: where the rule says, or from fresh noise if no step of it was taken.

        Noise is a function of row seed, position and step, so that the plain loop's is the same in any batch; each is used
        once, since a position is denoised by the target once.
        """
        device, taken = conditions.device, len(context.target.sampler)
        index = torch.tensor(rows, device=device, dtype=torch.long)
        position = (context.sequences.length_tensor + verdict.accepted)[index]
        counter = position[:, None] * (taken + 1) + torch.arange(taken + 1, device=device)
        noise = gaussian_noise(context.seeds[index], counter, context.target.dim)
        first = (verdict.steps[index] == 0)[:, None]
        x = torch.where(first, noise[:, 0], verdict.start[index])
        return cls(conditions[index, verdict.accepted[index]], x, [steps[r] for r in rows], noise[:, 1:])


def denoise(context: LatentContext, chains: Chains, window: int) -> None:
    """Take the target's steps until all `chains` are done, `window` at a time where a prediction is at hand."""
    target, stats = context.target, context.stats
    sampler, total = target.sampler, len(target.sampler)
    clean: Tensor | None = None
    while rows := [r for r, s in enumerate(chains.steps) if s < total]:
        index = torch.tensor(rows, device=target.device)
        at = torch.tensor([chains.steps[r] for r in rows], device=target.device)
        x, condition = chains.x[index], chains.condition[index]
        if clean is None:
            mean = target.means(condition, x, at)
            chains.x[index] = mean + sampler.std[at, None] * chains.noise[index, at]
            taken = [1] * len(rows)
            if window > 1:
                clean = torch.zeros_like(chains.x)
                clean[index] = sampler.clean(mean, x, at)
        else:
            width = min(window, total - min(chains.steps[r] for r in rows))
            y, last, progress = speculate(context, condition, x, at, clean[index], chains.noise[index], width)
            chains.x[index], clean[index] = y, last
            taken = progress.tolist()
        stats.head_calls += 1
        for r, n in zip(rows, taken, strict=True):
            chains.steps[r] += n


def speculate(
    context: LatentContext, condition: Tensor, x: Tensor, at: Tensor, clean: Tensor, noise: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft `width` denoising steps with the prediction `clean [R, D]` held, and keep those that couple with the target's.

    Returns where each chain `[R, D]` has come, the target's prediction there, and how many steps `[R]` were taken, ≥ 1.
    """
    sampler, total = context.target.sampler, len(context.target.sampler)
    ahead = at[:, None] + torch.arange(width, device=at.device)
    step = ahead.clamp(max=total - 1)
    points, means_q = [x], []
    for j in range(width):
        means_q.append(sampler.mean_of(clean, points[-1], step[:, j]))
        z = noise.gather(1, step[:, j, None, None].expand(-1, 1, x.shape[1]))[:, 0]
        points.append(means_q[-1] + sampler.std[step[:, j], None] * z)
    before, after, q = torch.stack(points[:-1], 1), torch.stack(points[1:], 1), torch.stack(means_q, 1)
    p = context.target.means(condition.unsqueeze(1), before, step)
    y, kept = reflection_coupling(after, q, p, sampler.std[step, None], generator=context.generator)
    lead = (kept & (ahead < total)).long().cumprod(1).sum(1)
    progress = torch.minimum((lead + 1).clamp(max=width), total - at)
    rows, last = torch.arange(len(at), device=at.device), progress - 1
    prediction = sampler.clean(p[rows, last], before[rows, last], step[rows, last])
    return y[rows, last], prediction, progress


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
