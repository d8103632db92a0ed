"""The goodness-of-fit test behind every claim of exactness."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def g_test(counts: ArrayLike, expected_probs: ArrayLike, least: float = 5.0) -> float:
    """p-value of `counts` under the distribution `expected_probs` (any shape, same for both; normalised here).

    Cells expected fewer than `least` times are pooled. A count where none is possible gives 0.
    """
    observed = np.asarray(counts, dtype=np.float64).ravel()
    probs = np.asarray(expected_probs, dtype=np.float64).ravel()
    if observed.shape != probs.shape:
        raise ValueError(f"{observed.shape[0]} counts against {probs.shape[0]} probabilities")
    if not (np.isfinite(probs).all() and (probs >= 0).all() and probs.sum() > 0):
        raise ValueError("expected_probs must be finite, non-negative and not all zero")
    if observed[probs == 0].any():
        return 0.0
    expected = probs / probs.sum() * observed.sum()
    small = expected < least
    observed = np.append(observed[~small], observed[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] < least and len(expected) > 1:  # what was pooled is still too little: it joins the smallest cell
        at = int(expected[:-1].argmin())
        observed[at] += observed[-1]
        expected[at] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    if len(expected) < 2:
        return 1.0
    return float(stats.power_divergence(observed, expected, lambda_="log-likelihood").pvalue)
