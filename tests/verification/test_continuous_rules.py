"""Rules over drafted continuous tokens: how far a draft stands, and where the target's chain goes on."""

from __future__ import annotations

import pytest
import torch

from polyspec import verification as v
from polyspec.errors import ConfigError, InputError

ROWS, N, T, D = 5, 3, 4, 2
STD = torch.tensor([0.9, 0.7, 0.6, 0.5])


def inputs(gap: float = 0.0, rows: int = ROWS, length: int = N, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(rows, length, T, D, generator=generator)
    noise = torch.randn(rows, length, T, D, generator=generator)
    points = torch.cat([torch.zeros(rows, length, 1, D), means + STD[:, None] * noise], dim=2)
    return tuple(x.to(device) for x in (points, means, means + gap, STD))


RULES = {"reflection_chain": v.reflection_chain, "cspd": v.cspd}


@pytest.mark.parametrize("name", RULES)
def test_equal_means_keep_every_token(name: str) -> None:
    verdict = RULES[name](*inputs())
    assert verdict.accepted.tolist() == [N] * ROWS
    assert verdict.steps.tolist() == [0] * ROWS, "the token behind them starts from fresh noise"
    assert bool(verdict.kept.all())


@pytest.mark.parametrize("name", RULES)
def test_far_means_keep_nothing(name: str) -> None:
    points, q, p, std = inputs(100.0)
    verdict = RULES[name](points, q, p, std)
    assert verdict.accepted.tolist() == [0] * ROWS
    assert bool((verdict.start - p[:, 0, 0 if name == "reflection_chain" else -1]).abs().amax() < 5)


def test_the_chain_goes_on_behind_the_first_step_that_does_not_couple() -> None:
    points, q, p, std = inputs()
    p = p.clone()
    p[2, 1, 2] += 100
    p[4, 0, 3] += 100
    verdict = v.reflection_chain(points, q, p, std)
    assert verdict.accepted.tolist() == [3, 3, 1, 3, 0]
    assert verdict.steps.tolist() == [0, 0, 3, 0, 4]
    z = (points[2, 1, 3] - q[2, 1, 2]) / std[2]
    e = torch.nn.functional.normalize(q[2, 1, 2] - p[2, 1, 2], dim=0)
    torch.testing.assert_close(verdict.start[2], p[2, 1, 2] + std[2] * (z - 2 * (e @ z) * e), atol=1e-4, rtol=1e-4)


def test_without_tries_cspd_takes_the_targets_own_aligned_sample() -> None:
    points, q, p, std = inputs(100.0)
    verdict = v.cspd(points, q, p, std, tries=0)
    torch.testing.assert_close(verdict.start, p[:, 0, -1] + points[:, 0, -1] - q[:, 0, -1])
    assert verdict.steps.tolist() == [T] * ROWS


def test_cspds_ratio_of_deviations_lowers_or_raises_acceptance() -> None:
    points, q, p, std = inputs(0.3, rows=4000, length=1)
    wide, same, narrow = (
        float(
            (v.cspd(points, q, p, std, std_q=s, generator=torch.Generator().manual_seed(0)).accepted > 0).float().mean()
        )
        for s in (torch.cat([std[:-1] * 1.3, std[-1:]]), std, torch.cat([std[:-1] / 1.3, std[-1:]]))
    )
    assert wide > same > narrow


@pytest.mark.parametrize("name", RULES)
def test_an_empty_draft_starts_the_next_token_from_noise(name: str) -> None:
    verdict = RULES[name](*inputs(length=0))
    assert verdict.accepted.tolist() == verdict.steps.tolist() == [0] * ROWS
    assert verdict.start.shape == (ROWS, D)


@pytest.mark.parametrize("name", RULES)
def test_no_rule_waits_for_the_device(name: str) -> None:
    RULES[name](*inputs(device="meta"))


@pytest.mark.parametrize("name", RULES)
def test_ill_formed_trajectories_are_refused(name: str) -> None:
    points, q, p, std = inputs()
    for bad in (
        (points[:, :, :1], q[:, :, :0], p[:, :, :0], std[:0]),
        (points, q[..., :1], p, std),
        (points, q, p, std[:2]),
    ):
        with pytest.raises(InputError):
            RULES[name](*bad)
    with pytest.raises(ConfigError, match="tries"):
        v.cspd(points, q, p, std, tries=-1)


def test_labels() -> None:
    assert v.reflection_chain.guarantee == "exact" and v.reflection_chain.paper == "2501.05370"
    assert v.cspd.guarantee == "heuristic" and v.cspd.paper == "2411.11925"
