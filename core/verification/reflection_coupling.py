"""Reflection coupling of two Gaussians with one covariance: speculative sampling for continuous tokens.

De Bortoli et al., "Accelerated Diffusion Models via Speculative Sampling", arXiv 2501.05370.

    x = μ_q + σ·z drawn by the draft;  Δ = (μ_q - μ_p) / σ,  e = Δ / |Δ|;
    keep y = x with probability min(1, φ(z + Δ) / φ(z)), else y = μ_p + σ·(z - 2⟨e, z⟩e).

Guarantee: exact, y ~ N(μ_p, σ²); P(y = x) = 2Φ(-|Δ|/2) = 1 - TV, the most any coupling reaches.

`reflection_chain` couples every denoising step of drafted tokens, where μ_p is the target's mean at the draft's own
points: a token stands if all its steps couple, and at the first that does not the target's chain goes on from y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_generator
from polyspec.verification.rule import LatentVerdict, rule
from polyspec.verification.sampling import leading


@rule(guarantee="exact", paper="2501.05370")
def reflection_coupling(
    x: Tensor, mean_q: Tensor, mean_p: Tensor, std: float | Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """x, mean_q, mean_p [.., D]; std a float or broadcastable to x -> (y [.., D], kept [..] bool).

    The last dimension is one vector. Where std is 0 the step is deterministic: y = mean_p, kept if the means agree.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    if x.dim() == 0 or x.shape != mean_q.shape or x.shape != mean_p.shape:
        raise InputError(
            f"x, mean_q and mean_p must have one shape [.., D], not "
            f"{list(x.shape)}, {list(mean_q.shape)}, {list(mean_p.shape)}"
        )
    if not x.dtype.is_floating_point:
        raise InputError(f"x must be floating point, not {x.dtype}")
    check_generator(generator, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    std = torch.as_tensor(std, dtype=dtype, device=x.device)
    noisy = std > 0
    whiten = torch.where(noisy, 1 / std, 0)

    z = (x - mean_q).to(dtype) * whiten
    gap = (mean_q - mean_p).to(dtype)
    delta = gap * whiten
    log_ratio = -(delta * (z + delta / 2)).sum(-1)  # log φ(z + Δ) - log φ(z)
    u = torch.rand(x.shape[:-1], generator=generator, device=x.device, dtype=dtype)
    kept = (u.log() < log_ratio) & (noisy | (gap == 0)).all(-1)

    square = delta.square().sum(-1, keepdim=True)
    along = torch.where(square > 0, (delta * z).sum(-1, keepdim=True) / square, 0)
    reflected = mean_p + (std * (z - 2 * along * delta)).to(x.dtype)
    return torch.where(kept.unsqueeze(-1), x, reflected), kept


@rule(guarantee="exact", paper="2501.05370")
def reflection_chain(
    points: Tensor, means_q: Tensor, means_p: Tensor, std: Tensor, *, generator: torch.Generator | None = None
) -> LatentVerdict:
    """points [B, N, T+1, D]: N drafted tokens from noise to token; means_q, means_p [B, N, T, D] of draft and target at
    points[:, :, :-1]; std [T], the same for both.

    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    check_trajectories(points, means_q, means_p, std)
    rows, length, steps, _ = means_p.shape
    y, kept = reflection_coupling(points[:, :, 1:], means_q, means_p, std[:, None], generator=generator)
    coupled = leading(kept.flatten(1))
    accepted = coupled.div(steps, rounding_mode="floor")
    chance = overlap(means_q, means_p, std[:, None])
    if length == 0:
        return LatentVerdict(accepted, accepted.clone(), points.new_zeros(rows, points.shape[-1]), kept, chance)
    first = coupled.clamp(max=length * steps - 1)
    start = y.flatten(1, 2)[torch.arange(rows, device=points.device), first]
    taken = torch.where(accepted < length, coupled - accepted * steps + 1, 0)
    return LatentVerdict(accepted, taken, start, kept, chance)


def overlap(mean_q: Tensor, mean_p: Tensor, std: Tensor) -> Tensor:
    """1 - TV = 2Φ(-|Δ|/2) of two Gaussians `[.., D]` with one deviation (broadcast; 0: whether they agree) -> `[..]`."""
    gap = (mean_q - mean_p).norm(dim=-1)
    std = std.squeeze(-1)
    return torch.where(std > 0, torch.erfc(gap / (std * 8**0.5)), (gap == 0).to(gap.dtype))


def check_trajectories(points: Tensor, means_q: Tensor, means_p: Tensor, std: Tensor) -> None:
    """InputError unless `points [B, N, T+1, D]` fit means `[B, N, T, D]` and std `[T]`."""
    if points.dim() != 4 or points.shape[2] < 2:
        raise InputError(f"points must be [B, N, T+1, D] with T ≥ 1 denoising steps, not {list(points.shape)}")
    rows, length, count, dim = points.shape
    expected = (rows, length, count - 1, dim)
    for name, means in (("means_q", means_q), ("means_p", means_p)):
        if means.shape != expected:
            raise InputError(
                f"{name} must be {list(expected)} for points {list(points.shape)}, not {list(means.shape)}"
            )
    if std.shape != (count - 1,):
        raise InputError(f"std must be [{count - 1}], one a denoising step, not {list(std.shape)}")
