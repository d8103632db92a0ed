"""The counter-based Gumbel noise: the right distribution, independence, and the same numbers in any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gtest import g_test
from scipy import stats

from polyspec import verification as v
from polyspec.errors import InputError

CELLS = 16


def uniforms(seed, positions, vocab):
    """Back from the noise to numbers in (0, 1)."""
    return torch.exp(-torch.exp(-v.gumbel_noise(seed, positions, vocab).double()))


def cells(u):
    return (u * CELLS).long().clamp(max=CELLS - 1)


def joint_fit(a, b):
    counts = (cells(a) * CELLS + cells(b)).flatten().bincount(minlength=CELLS**2)
    return g_test(counts, np.ones(CELLS**2))


GRID = (torch.arange(40), torch.arange(100, 130).expand(40, -1), 200)  # seeds, positions, tokens: 240,000 numbers


def test_noise_is_gumbel():
    noise = v.gumbel_noise(0, torch.arange(5).expand(4, -1), 20_000)
    assert noise.dtype == torch.float32 and noise.shape == (4, 5, 20_000)
    assert stats.kstest(noise.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-6
    assert bool(noise.isfinite().all())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2])
def test_neighbouring_seeds_positions_and_tokens_are_independent(axis, lag):
    u = uniforms(*GRID)
    assert joint_fit(u.narrow(axis, 0, u.shape[axis] - lag), u.narrow(axis, lag, u.shape[axis] - lag)) > 1e-6
    a, b = (u.narrow(axis, start, u.shape[axis] - lag).flatten().numpy() for start in (0, lag))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / len(a) ** 0.5


def test_each_token_and_each_position_is_uniform_across_seeds():
    u = uniforms(torch.arange(20_000), torch.full((20_000, 1), 7), 12)
    for token in range(12):
        assert g_test(cells(u[:, 0, token]).bincount(minlength=CELLS), np.ones(CELLS)) > 1e-6
    u = uniforms(torch.full((20_000,), 3), torch.arange(20_000)[:, None], 12)
    for token in range(12):
        assert g_test(cells(u[:, 0, token]).bincount(minlength=CELLS), np.ones(CELLS)) > 1e-6


@pytest.mark.parametrize("bit", [0, 1, 13, 31, 32, 62])
def test_every_bit_of_seed_and_position_changes_everything(bit):
    base = uniforms(torch.tensor([11]), torch.tensor([[5]]), 20_000)
    for seed, position in ((11 ^ (1 << bit), 5), (11, 5 ^ (1 << bit))):
        other = uniforms(torch.tensor([seed]), torch.tensor([[position]]), 20_000)
        assert joint_fit(base, other) > 1e-6
    # seed and position do not merely add up
    assert joint_fit(base, uniforms(torch.tensor([10]), torch.tensor([[6]]), 20_000)) > 1e-6


def test_the_small_exponential_tail_is_resolved():
    """E = exp(-G) close to 0 decides draws from peaked distributions: P(E < t) = t there, and values hardly repeat."""
    e = torch.exp(-v.gumbel_noise(0, torch.arange(200).expand(1, -1), 50_000).double()).flatten()
    for t in (1e-3, 1e-5):
        assert abs(int((e < t).sum()) - t * len(e)) < 6 * math.sqrt(t * len(e))
    small = e[e < 1e-4]
    assert len(small.unique()) > 0.99 * len(small)


def test_the_same_numbers_in_any_batch():
    positions = torch.randint(0, 10_000, (3, 5), generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([4, 2**40, -9])
    for vocab in (1, 2, 31, 1000, 4099):
        whole = v.gumbel_noise(seeds, positions, vocab)
        for row in range(3):
            assert torch.equal(whole[row], v.gumbel_noise(seeds[row : row + 1], positions[row], vocab))
            for t in range(5):
                one = v.gumbel_noise(seeds[row : row + 1], positions[row : row + 1, t : t + 1], vocab)
                assert torch.equal(whole[row, t], one[0, 0])
        assert torch.equal(whole[..., : vocab // 2], v.gumbel_noise(seeds, positions, vocab // 2)) or vocab < 2


def test_an_int_seeds_row_r_with_s_plus_r():
    positions = torch.arange(4).expand(3, -1)
    assert torch.equal(v.gumbel_noise(7, positions, 50), v.gumbel_noise(torch.tensor([7, 8, 9]), positions, 50))


def test_no_global_state_is_read_or_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = v.gumbel_noise(1, torch.arange(3), 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, v.gumbel_noise(1, torch.arange(3), 10))


def test_gumbel_argmax_draws_from_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    noise = v.gumbel_noise(0, torch.arange(1000).expand(200, -1), 5)
    tokens = v.gumbel_argmax(p.expand(200, 1000, 5), noise)
    assert g_test(tokens.flatten().bincount(minlength=5), p) > 1e-6


def test_agreement_of_coupled_draws_is_at_least_the_bound():
    p, q = (1.5 * torch.randn(2, 8, generator=torch.Generator().manual_seed(3))).softmax(-1)
    noise = v.gumbel_noise(0, torch.arange(1000).expand(100, -1), 8)
    agree = v.gumbel_argmax(p.expand_as(noise), noise) == v.gumbel_argmax(q.expand_as(noise), noise)
    tv = float((p - q).abs().sum() / 2)
    assert float(agree.float().mean()) > (1 - tv) / (1 + tv) - 0.01


def test_seeds_of_the_wrong_shape_are_refused():
    with pytest.raises(InputError, match="seed"):
        v.gumbel_noise(torch.tensor([1, 2]), torch.arange(4).expand(3, -1), 5)
    with pytest.raises(InputError, match="positions"):
        v.gumbel_noise(1, torch.zeros(2, 3, 4, dtype=torch.long), 5)
