"""Continuous speculative decoding (CSpD).

Wang et al., "Continuous Speculative Decoding for Autoregressive Image Generation", arXiv 2411.11925.

    Draft and target share the first noise and every step's noise (trajectory alignment): x^q and x^p.
    Accept the drafted token x with probability min(1, Σ · p(x | x^p) / q(x | x^q)),
    Σ = Π_t sqrt|Σ^q_t| / Π_t sqrt|Σ^p_t| over all steps but the last, whose Gaussians p and q are.
    After a rejection: propose y ~ p, keep it with probability [Σ·p(y) - q(y)]_+ / (Σ·p(y)), at most `tries` times;
    then take the target's own sample, the end of x^p.

Guarantee: heuristic. The ratio of two last steps stands in for that of two marginals, which nothing bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import ConfigError
from polyspec.verification.checks import check_generator
from polyspec.verification.reflection_coupling import check_trajectories
from polyspec.verification.rule import LatentVerdict, rule
from polyspec.verification.sampling import leading


@rule(guarantee="heuristic", paper="2411.11925")
def cspd(
    points: Tensor,
    means_q: Tensor,
    means_p: Tensor,
    std: Tensor,
    *,
    std_q: Tensor | None = None,
    tries: int = 16,
    generator: torch.Generator | None = None,
) -> LatentVerdict:
    """points [B, N, T+1, D]: the draft's; means_q, means_p [B, N, T, D]: of draft and target, each along its own aligned
    trajectory; std [T] of the target, std_q [T] of the draft (None: the same); tries >= 0 residual proposals.

    Raises InputError for shapes that do not fit, ConfigError for knobs out of range.
    """
    check_trajectories(points, means_q, means_p, std)
    check_generator(generator, points.device)
    if tries < 0:
        raise ConfigError(f"tries must be ≥ 0, got {tries}")
    rows, length, steps, _ = means_p.shape
    std_q = std if std_q is None else std_q
    log_ratio = std_q[:-1].log().sum() - std[:-1].log().sum()
    log_ratio = log_ratio * points.shape[-1]  # a covariance's determinant: one factor for each dimension
    token, mean_q, mean_p = points[:, :, -1], means_q[:, :, -1], means_p[:, :, -1]

    gap = log_ratio + log_density(token, mean_p, std[-1]) - log_density(token, mean_q, std_q[-1])
    u = torch.rand(rows, length, generator=generator, device=points.device)
    kept = u.log() < gap
    accepted = leading(kept)
    if length == 0:
        start = points.new_zeros(rows, points.shape[-1])
        return LatentVerdict(accepted, accepted.clone(), start, *(x[..., None].expand(-1, -1, steps) for x in (kept, gap)))

    at = accepted.clamp(max=length - 1)
    row = torch.arange(rows, device=points.device)
    mean_q, mean_p = mean_q[row, at][:, None], mean_p[row, at][:, None]
    own = mean_p[:, 0] + (token[row, at] - mean_q[:, 0]) / std_q[-1] * std[-1]
    noise = torch.randn(rows, tries, points.shape[-1], generator=generator, device=points.device)
    y = torch.cat([(mean_p + std[-1] * noise).to(points.dtype), own[:, None]], dim=1)  # the last is taken if none is
    lead = log_ratio + log_density(y, mean_p, std[-1]) - log_density(y, mean_q, std_q[-1])
    u = torch.rand(rows, tries + 1, generator=generator, device=points.device)
    fits = u < -torch.expm1(-lead)  # 1 - q / (Σ·p), never where that is negative
    fits[:, -1] = True
    start = y[row, fits.int().argmax(1)]
    chance = torch.ones_like(means_p[..., 0])
    chance[:, :, -1] = gap.exp().clamp(max=1)  # the one step that is judged
    taken = torch.where(accepted < length, steps, 0)
    return LatentVerdict(accepted, taken, start, kept[..., None].expand(-1, -1, steps), chance)


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std²) over the last dimension, up to a constant: [.., D] -> [..]."""
    return -0.5 * ((x - mean) / std).square().sum(-1) - x.shape[-1] * std.log()
