"""Reflection coupling: the target's Gaussian comes out, and x is kept as often as any coupling can."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from polyspec import verification as v
from polyspec.errors import InputError

ROWS = 200_000


def coupled(mean_q, mean_p, std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean_q, mean_p = (m.expand(ROWS, -1) for m in (mean_q, mean_p))
    x = mean_q + std * torch.randn(mean_q.shape, generator=generator)
    return x, *v.reflection_coupling(x, mean_q, mean_p, std, generator=generator)


@pytest.mark.parametrize("std", [0.7, torch.tensor([0.5, 1.0, 2.0])])
def test_output_is_the_targets_gaussian(std):
    mean_q, mean_p = torch.tensor([0.3, -1.0, 0.2]), torch.tensor([0.0, -0.5, 0.6])
    x, y, kept = coupled(mean_q, mean_p, std)
    z = ((y - mean_p) / std).double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):  # every projection of a standard Gaussian is a standard Gaussian
        direction = torch.nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0)
        assert stats.kstest((z @ direction).numpy(), "norm").pvalue > 1e-6
    assert stats.kstest(z.square().sum(1).numpy(), stats.chi2(3).cdf).pvalue > 1e-6
    assert torch.equal(y[kept], x[kept])
    gap = float((((mean_q - mean_p) / std).square().sum()).sqrt())
    assert abs(float(kept.float().mean()) - 2 * stats.norm.cdf(-gap / 2)) < 5 * 0.5 / ROWS**0.5


def test_returning_the_targets_own_draw_without_reflection_is_caught():
    """A fresh draw after a rejection, or x moved over, is not the target's Gaussian."""
    mean_q, mean_p = torch.tensor([1.5]), torch.tensor([0.0])
    x, _, kept = coupled(mean_q, mean_p, 1.0)
    fresh = torch.where(kept[:, None], x, torch.randn(x.shape, generator=torch.Generator().manual_seed(5)))
    assert stats.kstest(fresh[:, 0].numpy(), "norm").pvalue < 1e-6
    moved = torch.where(kept[:, None], x, x - mean_q)
    assert stats.kstest(moved[:, 0].numpy(), "norm").pvalue < 1e-6


def test_equal_means_keep_everything():
    mean = torch.tensor([0.1, 0.2])
    x, y, kept = coupled(mean, mean, 0.5)
    assert bool(kept.all()) and torch.equal(x, y)


def test_a_step_without_noise_takes_the_targets_mean():
    q = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    p = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    y, kept = v.reflection_coupling(q, q, p, 0.0)
    assert torch.equal(y, p) and kept.tolist() == [True, False]


def test_shapes_and_half_precision():
    x = torch.randn(3, 4, 5, 6, dtype=torch.bfloat16)
    y, kept = v.reflection_coupling(x, torch.zeros_like(x), torch.ones_like(x), torch.full((4, 1, 1), 0.5))
    assert y.shape == x.shape and y.dtype == x.dtype and kept.shape == (3, 4, 5)
    with pytest.raises(InputError):
        v.reflection_coupling(x, x[0], x, 1.0)
    with pytest.raises(InputError):
        v.reflection_coupling(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2), torch.ones(2, 2), 1.0)
