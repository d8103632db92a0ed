"""The judge itself: fair counts pass, biased ones do not, impossible ones never."""

from __future__ import annotations

import numpy as np
import pytest
from gtest import g_test
from scipy import stats


def test_p_values_of_fair_counts_are_uniform():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(30))
    p_values = [g_test(rng.multinomial(20_000, probs), probs) for _ in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_a_small_bias_is_found():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(30))
    biased = 0.97 * probs + 0.03 / 30
    assert g_test(rng.multinomial(200_000, biased), probs) < 1e-6


def test_counts_where_none_can_be_are_fatal():
    assert g_test([10, 10, 1], [0.5, 0.5, 0.0]) == 0.0
    assert g_test([10, 10, 0], [0.5, 0.5, 0.0]) > 0.9


def test_small_cells_are_pooled():
    probs = np.append(np.full(1000, 1e-6), [0.5, 0.499])
    rng = np.random.default_rng(0)
    assert g_test(rng.multinomial(10_000, probs / probs.sum()), probs) > 1e-6
    rare = np.zeros(1002)
    rare[3], rare[-1] = 500, 9_500
    assert g_test(rare, probs) < 1e-6


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="probabilities"):
        g_test([1, 2], [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match="finite"):
        g_test([1, 2], [0.5, np.nan])
