"""Continuous tokens: what a loop needs of a model whose tokens are vectors drawn by a diffusion head.

A token `x [D]` is drawn in T denoising steps from noise x_0 ~ N(0, 1): step t draws x_{t+1} ~ N(μ_t(x_t, c), σ_t²), where c
is the condition that the autoregressive model gives for the token, and x_T is the token (steps count in the order they
are taken). `Sampler` holds a diffusers scheduler's coefficients, computed once; `ContinuousTarget` is the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from polyspec.errors import ConfigError, InputError, UnsupportedModelError
from polyspec.verification import gumbel_noise

DETERMINISTIC = 1e-8  # a standard deviation diffusers leaves where it means none (its variances are clamped to 1e-20)


@dataclass(frozen=True)
class Sampler:
    """The T steps of a DDPM sampler (2006.11239, equation 7) in the order they are taken, each a tensor `[T]`.

    The prediction of the clean token is `clean_x · x + clean_out · output`, clamped to ±clip;
    the mean of the next step is `mean_clean · clean + mean_x · x`, its standard deviation `std`.
    """

    timesteps: Tensor
    clean_x: Tensor
    clean_out: Tensor
    mean_clean: Tensor
    mean_x: Tensor
    std: Tensor
    clip: float | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any, steps: int, last_std: float | None = None) -> Sampler:
        """Read the coefficients of a diffusers `DDPMScheduler` for `steps` steps.

        The last step keeps its noise, which diffusers' own `step` drops at timestep 0: that of the scheduler's variance
        (`fixed_large`; `fixed_small` has none there), or `last_std`.
        Raises ConfigError for a number of steps out of range, UnsupportedModelError for other schedulers and for learned
        variances, which differ between two models.
        """
        config = getattr(scheduler, "config", {})
        if not hasattr(scheduler, "previous_timestep") or not hasattr(scheduler, "_get_variance"):
            raise UnsupportedModelError(
                f"{type(scheduler).__name__} is not a stochastic DDPM sampler (its steps, the last one included, add no "
                "noise of a fixed variance, so that draft and target cannot be coupled); use diffusers' DDPMScheduler"
            )
        if config["variance_type"] not in ("fixed_small", "fixed_small_log", "fixed_large") or config["thresholding"]:
            raise UnsupportedModelError(
                f"variance_type={config['variance_type']!r}, thresholding={config['thresholding']}: steps of draft and "
                "target must have one covariance; use variance_type='fixed_large' and thresholding=False"
            )
        most = config["num_train_timesteps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
            raise ConfigError(f"the number of denoising steps must be a whole number in [1, {most}], got {steps!r}")
        if last_std is not None and last_std < 0:
            raise ConfigError(f"last_std must be ≥ 0, got {last_std}")
        scheduler.set_timesteps(steps)
        times = [int(t) for t in scheduler.timesteps]
        before = [int(scheduler.previous_timestep(t)) for t in times]
        a = scheduler.alphas_cumprod.double()[times]
        a_prev = torch.stack([scheduler.alphas_cumprod.double()[p] if p >= 0 else a.new_ones(()) for p in before])
        beta = 1 - a / a_prev
        power = 1.0 if config["variance_type"] == "fixed_small_log" else 0.5  # that one is a deviation already
        std = torch.stack([torch.as_tensor(scheduler._get_variance(t)).double() for t in times]) ** power
        std = torch.where(std > DETERMINISTIC, std, 0.0)
        if last_std is not None:
            std[-1] = last_std
        kinds = {
            "epsilon": (a**-0.5, -(((1 - a) / a) ** 0.5)),
            "sample": (torch.zeros_like(a), torch.ones_like(a)),
            "v_prediction": (a**0.5, -((1 - a) ** 0.5)),
        }
        clean_x, clean_out = kinds[config["prediction_type"]]
        mean_clean, mean_x = a_prev**0.5 * beta / (1 - a), (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a)
        numbers = [x.float() for x in (clean_x, clean_out, mean_clean, mean_x, std)]
        clip = float(config["clip_sample_range"]) if config["clip_sample"] else None
        return cls(torch.tensor(times), *numbers, clip=clip)

    def __len__(self) -> int:
        return len(self.std)

    def to(self, device: torch.device | str) -> Sampler:
        """On `device`."""
        moved = (
            x.to(device) for x in (self.timesteps, self.clean_x, self.clean_out, self.mean_clean, self.mean_x, self.std)
        )
        return Sampler(*moved, clip=self.clip)

    @cached_property
    def coefficients(self) -> Tensor:
        """`[T, 4]`: clean_x, clean_out, mean_clean, mean_x, so that a step looks them up at once."""
        return torch.stack([self.clean_x, self.clean_out, self.mean_clean, self.mean_x], dim=1)

    def mean(self, output: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Mean `[.., D]` of the step numbered `step [..]` from x, for the network's `output [.., D]`."""
        clean_x, clean_out, mean_clean, mean_x = self.coefficients[step].unsqueeze(-2).unbind(-1)
        clean = torch.addcmul(clean_x * x, clean_out, output)
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        return torch.addcmul(mean_x * x, mean_clean, clean)

    def mean_of(self, clean: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Mean `[.., D]` of step `step [..]` from x if the clean token is predicted to be `clean [.., D]`."""
        return self.mean_clean[step, None] * clean + self.mean_x[step, None] * x

    def clean(self, mean: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """The prediction of the clean token that `mean` was made from: `mean_of` the other way round."""
        return (mean - self.mean_x[step, None] * x) / self.mean_clean[step, None]

    def check_noise(self) -> None:
        """ConfigError if a step is deterministic: nothing drafted through it could ever be kept."""
        still = (self.std <= 0).nonzero().flatten().tolist()
        if still:
            last = still == [len(self) - 1]
            raise ConfigError(
                f"the sampler's {'last step' if last else f'step {still[0]}'} is deterministic (standard deviation 0), where a "
                "drafted token can never equal the target's; use variance_type='fixed_large', give the model's "
                "configuration a last_std > 0, or choose recipe=autoregressive"
            )

    def check_same(self, other: Sampler) -> None:
        """InputError unless `other` takes steps of the same number and covariance."""
        if len(self) != len(other):
            raise InputError(
                f"the draft model denoises in {len(other)} steps, the target in {len(self)}; set denoising_steps of both alike"
            )
        if not torch.allclose(self.std.cpu(), other.std.cpu(), rtol=1e-5, atol=0):
            step = int((self.std.cpu() - other.std.cpu()).abs().argmax())
            raise InputError(
                f"the covariances of draft and target differ (step {step}: standard deviations {float(other.std[step]):.4g} "
                f"and {float(self.std[step]):.4g}); give both models the target's scheduler"
            )


@runtime_checkable
class ContinuousTarget(Protocol):
    """An autoregressive model over latents with a diffusion head.

    Slot 0 of a row is its prompt's last token, slot i its latent i - 1; what was before slot 0 is in the cache after
    `prefill`. Between rounds a row with n latents keeps n slots, so that its last latent is fed with the next drafts.
    """

    dim: int
    """Numbers D in a latent."""
    sampler: Sampler
    device: torch.device
    size: int
    """Parameters of the model, by which what its calls cost is known again."""

    def prefill(self, prompt: Any, capacity: int) -> None:
        """Run the prompts of B rows (in a form of the model's own) but for each one's last token; room for `capacity`
        latents."""
        ...

    def forward(self, latents: Tensor) -> Tensor:
        """Feed `[B, T, D]` behind each row's kept slots (in slot 0's place anything may stand). Returns the conditions
        `[B, T, ...]` of the tokens that follow each. Call `rollback` afterwards."""
        ...

    def rollback(self, slots: Sequence[int]) -> None:
        """Keep the first `slots[b]` slots of each row."""
        ...

    def means(self, condition: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Means `[.., D]` of denoising steps `step [..]` long from `x [.., D]`; condition `[.., ...]`, whose leading
        dimensions broadcast to step's. One head call, guidance included."""
        ...


class Ahead:
    """Up to `width` steps at once from any step on, with the prediction of the clean token held: an affine map.

    Steps behind the last one change nothing.
    """

    def __init__(self, sampler: Sampler, width: int):
        total, self.width = len(sampler), width
        ahead = torch.arange(total, device=sampler.std.device)[:, None] + torch.arange(width, device=sampler.std.device)
        inside, self.steps = ahead < total, ahead.clamp(max=total - 1)  # [T, W]
        mean_x, mean_clean = (torch.where(inside, x[self.steps], e) for x, e in ((sampler.mean_x, 1), (sampler.mean_clean, 0)))
        self.inside, self.std = inside, torch.where(inside, sampler.std[self.steps], 0.0)
        row = torch.zeros(total, width + 2, device=ahead.device)  # of x, of the prediction, of each step's noise
        row[:, 0] = 1
        rows = []
        for j in range(width):
            row = mean_x[:, j, None] * row
            row[:, 1] += mean_clean[:, j]
            row[:, 2 + j] = self.std[:, j]
            rows.append(row)
        self.map = torch.stack(rows, dim=1)  # [T, W, W + 2]

    def points(self, x: Tensor, clean: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """`[R, W, D]` behind each of the steps from `at [R]` on: x and the prediction `[R, D]`, noise `[R, W, D]`."""
        return self.map[at] @ torch.cat([x.unsqueeze(1), clean.unsqueeze(1), noise], dim=1)


def gaussian_noise(seeds: Tensor, index: Tensor, dim: int) -> Tensor:
    """Standard Gaussian noise `[R, W, dim]` float32, a function of row seed `[R]` and index `[R, W]` alone, in any batch."""
    exponential = (-gumbel_noise(seeds, index, dim).double()).exp()
    return torch.special.ndtri(-torch.expm1(-exponential)).float()
