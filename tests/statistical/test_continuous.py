"""Continuous tokens through the full loop have the target's distribution, known in closed form; wrong loops do not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from linear_gaussian import STD, TOKENS, LinearGaussian, decode, fit, with_std

from polyspec.decoding.continuous import Continuous, aligned
from polyspec.verification import LatentVerdict, cspd, reflection_chain

LEAST, SHIFT = 1e-6, 0.6
WRONG_ROWS = 30_000
SETTINGS = {
    "plain, steps drafted ahead": {"draft": None, "window": 3},
    "drafted": {},
    "drafted, steps drafted ahead": {"window": 3, "length": 3},
}
SLOW = {
    "plain": {"draft": None},
    "drafted with held predictions": {"stride": 2},
    "the target alone at first": {"prefill": 0.5},
}


@pytest.mark.parametrize("name", [*SETTINGS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_tokens_have_the_targets_distribution(name: str) -> None:
    knobs = {"draft": LinearGaussian(SHIFT), **{**SETTINGS, **SLOW}[name]}
    tokens, stats = decode(LinearGaussian(), **knobs)
    assert fit(tokens, LinearGaussian()) > LEAST
    assert stats.new_tokens == tokens.shape[0] * TOKENS
    if knobs["draft"] is not None:
        assert 0.05 < stats.acceptance_rate < 0.95, "both ways through the rule are taken"


def wrong_sign(points, means_q, means_p, std, *, generator=None):
    """The reflected noise with its sign wrong: μ_p + σ·(2⟨e, z⟩e - z)."""
    verdict = reflection_chain(points, means_q, means_p, std, generator=generator)
    if points.shape[1] == 0:
        return verdict
    row, step = torch.arange(len(points)), (verdict.steps - 1).clamp(min=0)
    token = verdict.accepted.clamp(max=points.shape[1] - 1)
    turned = 2 * means_p[row, token, step] - verdict.start
    return LatentVerdict(verdict.accepted, verdict.steps, turned, verdict.kept, verdict.chance)


def not_reflected(points, means_q, means_p, std, *, generator=None):
    """After a rejection a fresh draw of the target's step instead of the reflection."""
    verdict = reflection_chain(points, means_q, means_p, std, generator=generator)
    if points.shape[1] == 0:
        return verdict
    row, step = torch.arange(len(points)), (verdict.steps - 1).clamp(min=0)
    mean = means_p[row, verdict.accepted.clamp(max=points.shape[1] - 1), step]
    fresh = mean + std[step, None] * torch.randn(mean.shape, generator=generator)
    return LatentVerdict(verdict.accepted, verdict.steps, fresh, verdict.kept, verdict.chance)


def suffix_kept(points, means_q, means_p, std, *, generator=None):
    """A rejected first token is replaced, and yet the token drafted behind it stays."""
    verdict = reflection_chain(points, means_q, means_p, std, generator=generator)
    if points.shape[1] < 2:
        return verdict
    points[:, 0, -1] = torch.where((verdict.accepted == 0)[:, None], verdict.start, points[:, 0, -1])
    behind = torch.where(verdict.accepted == 0, 1, verdict.accepted)
    steps = torch.where(verdict.accepted == 0, STD.numel(), verdict.steps)
    return LatentVerdict(behind, steps, points[:, 1, -1], verdict.kept, verdict.chance)


WRONG = {
    "the sign of the reflection": {"rule": wrong_sign},
    "no reflection": {"rule": not_reflected},
    "the drafted suffix is kept": {"rule": suffix_kept},
    "means along the target's own trajectory": {"trajectory": aligned},
}
SLOW_WRONG = ["no reflection"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_WRONG else n for n in WRONG])
def test_a_wrong_loop_is_caught(name: str) -> None:
    tokens, _ = decode(LinearGaussian(), LinearGaussian(SHIFT), rows=WRONG_ROWS, **WRONG[name])
    assert fit(tokens, LinearGaussian()) < LEAST


def test_a_last_step_without_noise_in_one_of_the_two_is_caught() -> None:
    """Drafts keep the last step's noise, the target's own chain leaves it out."""

    class Quiet(Continuous):
        def judge(self, context, conditions, draft):
            context.target.sampler = LinearGaussian().sampler
            verdict = super().judge(context, conditions, draft)
            with_std(context.target, torch.cat([STD[:-1], torch.zeros(1)]))
            return verdict

    tokens, _ = decode(LinearGaussian(), LinearGaussian(SHIFT), rows=WRONG_ROWS, loop=Quiet)
    assert fit(tokens, LinearGaussian()) < LEAST


def test_cspd_is_exact_with_a_single_denoising_step_and_tries_enough() -> None:
    """There p(x | x^p) is the token's whole distribution, and the rule that of speculative sampling."""
    one = STD[:1]
    target, draft = LinearGaussian(std=one), LinearGaussian(0.4, std=one)
    tokens, stats = decode(target, draft, rows=WRONG_ROWS, rule=partial(cspd, tries=100), trajectory=aligned)
    assert fit(tokens, target) > LEAST
    assert 0.1 < stats.acceptance_rate < 0.95
