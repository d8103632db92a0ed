"""The target's own denoising chains, step by step or several steps ahead.

De Bortoli et al., "Accelerated Diffusion Models via Speculative Sampling", arXiv 2501.05370, section 3.2: some steps are
drafted with the last prediction of the clean token held, which needs no network; one head call over all of them gives the
target's means there, and reflection coupling keeps the leading ones that hold. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyspec.denoising import Ahead, gaussian_noise
from polyspec.drafting.continuous import LatentContext
from polyspec.verification import LatentVerdict, reflection_coupling


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

    def unfinished(self, total: int) -> Tensor | None:
        """The rows with steps to take, None if there is none; no row number is looked up while all have."""
        rows = [r for r, s in enumerate(self.steps) if s < total]
        return torch.tensor(rows, device=self.x.device) if rows else None


def denoise(context: LatentContext, chains: Chains, ahead: Ahead | None = None) -> int:
    """Take the target's steps until all `chains` are done; with `ahead` several at a time. Returns the head calls made."""
    calls = 0
    total = len(context.target.sampler)
    clean: Tensor | None = None
    while (rows := chains.unfinished(total)) is not None:
        whole = len(rows) == len(chains.steps)
        left = [(r, s) for r, s in enumerate(chains.steps) if s < total]  # as `rows`, known without asking the device
        at = torch.tensor([s for _, s in left], device=rows.device)
        x, condition, noise = (y if whole else y[rows] for y in (chains.x, chains.condition, chains.noise))
        if clean is None or ahead is None:
            y, last = step(context, condition, x, at, noise, ahead is not None)
            taken = [1] * len(rows)
        else:
            y, last, progress = speculate(context, condition, x, at, clean[rows], noise, ahead)
            taken = progress.tolist()
        calls += 1
        chains.x = y if whole else chains.x.index_copy(0, rows, y)
        if last is not None:
            clean = last if whole else (torch.zeros_like(chains.x) if clean is None else clean).index_copy(0, rows, last)
        for (r, _), n in zip(left, taken, strict=True):
            chains.steps[r] += n
    context.stats.head_calls += calls
    return calls


def step(
    context: LatentContext, condition: Tensor, x: Tensor, at: Tensor, noise: Tensor, predict: bool
) -> tuple[Tensor, Tensor | None]:
    """One step of the chains at x `[R, D]`: the points behind it, and if wanted the prediction it was made from."""
    sampler = context.target.sampler
    mean = context.target.means(condition, x, at)
    z = noise[torch.arange(len(at), device=at.device), at]
    return torch.addcmul(mean, sampler.std[at, None], z), sampler.clean(mean, x, at) if predict else None


def speculate(
    context: LatentContext, condition: Tensor, x: Tensor, at: Tensor, clean: Tensor, noise: Tensor, ahead: Ahead
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft steps with the prediction `clean [R, D]` held, and keep those that couple with the target's.

    Returns where each chain `[R, D]` has come, the target's prediction there, and how many steps `[R]` were taken, ≥ 1.
    """
    sampler = context.target.sampler
    rows, steps, std = torch.arange(len(at), device=at.device), ahead.steps[at], ahead.std[at].unsqueeze(-1)
    z = noise[rows[:, None], steps]
    after = ahead.points(x, clean, z, at)
    before = torch.cat([x.unsqueeze(1), after[:, :-1]], dim=1)
    p = context.target.means(condition.unsqueeze(1), before, steps)
    y, kept = reflection_coupling(after, torch.addcmul(after, std, z, value=-1), p, std, generator=context.generator)
    lead = (kept & ahead.inside[at]).long().cumprod(1).sum(1)
    progress = torch.minimum((lead + 1).clamp(max=ahead.width), len(sampler) - at)
    last = progress - 1
    prediction = sampler.clean(p[rows, last], before[rows, last], steps[rows, last])
    return y[rows, last], prediction, progress
