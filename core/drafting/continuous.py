"""Drafts of continuous tokens: a smaller autoregressive model with a diffusion head of its own.

2411.11925 drafts with a smaller model of the target's family. Training-free drafts (2501.05370, section 3.2) hold a
prediction of the clean token over several denoising steps: `stride` does so in the draft model, which may then be the
target itself; the loop's `window` does so in the target's own chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyspec.denoising import Ahead, ContinuousTarget
from polyspec.errors import ConfigError, InputError
from polyspec.lengths import LengthPolicy, positive
from polyspec.metrics import LatentStats

if TYPE_CHECKING:
    from polyspec.decoding.continuous import Latents


@dataclass(frozen=True, slots=True)
class LatentDraft:
    """N drafted tokens with how they came about: `points [B, N, T+1, D]`, from noise to token, and the means
    `[B, N, T, D]` that each point but the first was drawn around."""

    points: Tensor
    means: Tensor

    @property
    def tokens(self) -> Tensor:
        """`[B, N, D]`."""
        return self.points[:, :, -1]


@dataclass(frozen=True, slots=True)
class LatentContext:
    """What a run shares: the target and its prompts, the rows, their seeds `[B]`, randomness, the policy and counts."""

    target: ContinuousTarget
    prompt: Any
    sequences: Latents
    seeds: Tensor
    generator: torch.Generator | None
    length: LengthPolicy
    stats: LatentStats
    guidance: float = 1.0


class LatentDraftModel:
    """Drafts token by token with `draft_model`.

    draft_model: a model with the method `latent_target(guidance_scale) -> ContinuousTarget`, or the folder of one.
    stride: its head is asked at every stride-th denoising step, and its prediction of the clean token held in between.
    """

    def __init__(self, draft_model: Any, stride: int = 1):
        self.stride = positive("stride", stride)
        if isinstance(draft_model, str | PathLike):
            from transformers import AutoModel

            from polyspec.pipelines import load

            # latents are compared step by step: half precision would be noise of its own
            draft_model = load(AutoModel.from_pretrained, str(draft_model), dtype=torch.float32).eval()
        if not hasattr(draft_model, "latent_target"):
            raise ConfigError(
                f"draft_model must be a model of continuous tokens or the folder of one, got {type(draft_model).__name__}"
            )
        self.model: Any = draft_model

    @property
    def marks(self) -> tuple[int, ...]:
        """What its cost depends on."""
        return self.model.latent_target(1.0).size, self.stride

    def check(self, target: ContinuousTarget) -> None:
        """InputError unless both models have latents of one size and steps of the same number and covariance."""
        draft = self.model.latent_target(1.0)
        if draft.dim != target.dim:
            raise InputError(f"the draft model's latents have {draft.dim} numbers, the target's {target.dim}; train it on the "
                             "target's latents")  # fmt: skip
        target.sampler.check_same(draft.sampler)

    def begin(self, context: LatentContext) -> None:
        """Start a run."""
        self.context = context
        if isinstance(self.model, torch.nn.Module):
            self.model = self.model.to(context.target.device)
        self.draft = self.model.latent_target(context.guidance)
        self.draft.prefill(context.prompt, context.sequences.limit)
        self.kept = [0] * context.sequences.batch
        self.ahead = Ahead(self.draft.sampler, self.stride)

    def propose_latents(self, count: int) -> LatentDraft:
        """`count` ≥ 1 tokens to follow each row's last one, drawn from the draft model's own sampler."""
        sequences, lengths = self.context.sequences, self.context.sequences.lengths
        # rounds without a draft, and the last token of a draft that held, leave it behind
        start = torch.tensor(self.kept, device=self.draft.device)
        width = max(n + 1 - k for n, k in zip(lengths, self.kept, strict=True))
        conditions = self.draft.forward(sequences.slots(start, width))
        condition = conditions[torch.arange(len(lengths), device=start.device), sequences.length_tensor - start]
        drawn = [self.denoise(condition)]
        self.kept = [n + 1 for n in lengths]
        self.draft.rollback(self.kept)
        self.context.stats.draft_calls += count
        while len(drawn) < count:
            condition = self.draft.forward(drawn[-1][0][:, None, -1])[:, 0]
            self.kept = [k + 1 for k in self.kept]
            self.draft.rollback(self.kept)
            drawn.append(self.denoise(condition))
        points, means = zip(*drawn, strict=True)
        return LatentDraft(torch.stack(points, 1), torch.stack(means, 1))

    def denoise(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Points `[B, T+1, D]` and means `[B, T, D]` of one token each, given conditions `[B, ...]`."""
        sampler, generator, total = self.draft.sampler, self.context.generator, len(self.draft.sampler)
        noise = torch.randn((len(condition), total + 1, self.draft.dim), generator=generator, device=condition.device)
        x, every = noise[:, 0], torch.arange(total, device=condition.device)
        points = [x[:, None]]
        for t in range(0, total, self.stride):
            step = every[t].expand(len(x))
            mean = self.draft.means(condition, x, step)
            self.context.stats.draft_head_calls += 1
            if self.stride == 1:
                points.append(torch.addcmul(mean, sampler.std[t], noise[:, t + 1]).unsqueeze(1))
            else:
                z = noise[:, 1:][:, self.ahead.steps[t]]
                points.append(self.ahead.points(x, sampler.clean(mean, x, step), z, step)[:, : total - t])
            x = points[-1][:, -1]
        found = torch.cat(points, 1)
        return found, torch.addcmul(found[:, 1:], sampler.std[:, None], noise[:, 1:], value=-1)

    def observe_latents(self) -> None:
        """After a round: forget what was not kept."""
        self.kept = [min(k, n) for k, n in zip(self.kept, self.context.sequences.lengths, strict=True)]
        self.draft.rollback(self.kept)
