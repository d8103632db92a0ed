"""A continuous target whose output distribution is known: conditions linear in all earlier tokens, means affine in x and c."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from polyspec.decoding.continuous import Continuous, Latents
from polyspec.denoising import Sampler
from polyspec.drafting.base import NoDraft
from polyspec.drafting.continuous import LatentContext, LatentDraftModel
from polyspec.lengths import Fixed
from polyspec.metrics import LatentStats
from polyspec.verification import reflection_chain

DIM, STEPS, TOKENS = 2, 4, 4
STD = torch.tensor([0.9, 0.7, 0.6, 0.5])


def sampler(std: Tensor = STD) -> Sampler:
    """Coefficients with which a held prediction is a fair guess of the affine means below."""
    steps, one = len(std), torch.ones(len(std))
    return Sampler(torch.arange(steps - 1, -1, -1), 0 * one, one, 0.4 * one, 0.6 * one, std)


class LinearGaussian:
    """h_0 = prompt, h_n = ρ·h_{n-1} + W·x_n; mean_t(x, h) = A_t·x + B_t·h + d_t. `shift` moves it away from the target."""

    size = 100

    def __init__(self, shift: float = 0.0, std: Tensor = STD, dim: int = DIM, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            draws = [torch.randn(shape, generator=generator) for _ in range(2)]
            return draws[0] + shift * draws[1]

        self.dim, self.sampler, self.device = dim, sampler(std), torch.device("cpu")
        self.rho, self.w = 0.6, 0.5 * numbers(dim, dim)
        self.a = 0.6 * torch.eye(dim) + 0.1 * numbers(len(std), dim, dim)
        self.b, self.d = 0.4 * numbers(len(std), dim, dim), 0.3 * numbers(len(std), dim)

    def latent_target(self, guidance: float) -> LinearGaussian:
        assert guidance == 1
        return self

    def prefill(self, prompt: Tensor, capacity: int) -> None:
        self.prompt, self.kept = prompt, [0] * len(prompt)
        self.states = prompt.new_zeros(len(prompt), capacity + 8, self.dim)

    def forward(self, latents: Tensor) -> Tensor:
        rows, slots = torch.arange(len(latents)), torch.tensor(self.kept)
        for j in range(latents.shape[1]):
            before = self.states[rows, (slots + j - 1).clamp(min=0)]
            state = torch.where((slots + j == 0)[:, None], self.prompt, self.rho * before + latents[:, j] @ self.w.T)
            self.states[rows, slots + j] = state
        return self.states[rows[:, None], slots[:, None] + torch.arange(latents.shape[1])]

    def rollback(self, slots: Sequence[int]) -> None:
        self.kept = list(slots)

    def means(self, condition: Tensor, x: Tensor, step: Tensor) -> Tensor:
        along = (self.a[step] @ x[..., None] + self.b[step] @ condition.expand(x.shape)[..., None])[..., 0]
        return along + self.d[step]

    def distribution(self, prompt: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean `[TOKENS·D]` and covariance of a row's tokens, from the definition."""
        d, (a, b, c, w) = self.dim, (x.double().numpy() for x in (self.a, self.b, self.d, self.w))
        gain, offset, noise = np.zeros((d, d)), np.zeros(d), np.eye(d)  # x_T = gain·h + offset + N(0, noise)
        for t, std in enumerate(self.sampler.std.tolist()):
            gain, offset = a[t] @ gain + b[t], a[t] @ offset + c[t]
            noise = a[t] @ noise @ a[t].T + std**2 * np.eye(d)
        root = np.linalg.cholesky(noise)
        state, mix = prompt.double().numpy(), np.zeros((d, d * TOKENS))  # of h: its mean, and what noise enters it
        means, mixes = [], []
        for n in range(TOKENS):
            token, token_mix = gain @ state + offset, gain @ mix
            token_mix[:, n * d : (n + 1) * d] += root
            means.append(token)
            mixes.append(token_mix)
            state, mix = self.rho * state + w @ token, self.rho * mix + w @ token_mix
        full = np.concatenate(mixes)
        return np.concatenate(means), full @ full.T


PROMPT = torch.tensor([0.8, -0.5])


def decode(
    target: LinearGaussian,
    draft: LinearGaussian | None = None,
    *,
    rows: int = 100_000,
    length: int = 2,
    rule=reflection_chain,
    seed: int = 0,
    stride: int = 1,
    loop: type[Continuous] = Continuous,
    policy: Any = None,
    **knobs,
) -> tuple[Tensor, LatentStats]:
    """TOKENS tokens of `rows` rows through the full loop: `[rows, TOKENS, D]`."""
    sequences = Latents(rows, TOKENS, target.dim, target.device)
    seeds = torch.arange(rows) + (seed << 32)
    generator = torch.Generator().manual_seed(seed)
    run = LatentStats()
    prompt = PROMPT[: target.dim].expand(rows, -1)
    context = LatentContext(target, prompt, sequences, seeds, generator, policy or Fixed(length), run)
    drafter = NoDraft() if draft is None else LatentDraftModel(draft, stride)
    loop(rule, **knobs).run(context, drafter)
    return sequences.result(), run


def fit(tokens: Tensor, target: LinearGaussian) -> float:
    """The smallest of the p-values of mean, covariance, every marginal, some projections and the Mahalanobis distance."""
    mean, covariance = target.distribution(PROMPT)
    x = tokens.flatten(1).double().numpy()
    n, size = x.shape
    white = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T).T
    off = white.T @ white / n - np.eye(size)
    spread = np.where(np.eye(size) > 0, 2 / n, 1 / n)
    upper = np.triu_indices(size)
    values = [
        stats.chi2(size).sf(n * (white.mean(0) ** 2).sum()),
        stats.chi2(len(upper[0])).sf((off**2 / spread)[upper].sum()),
        stats.kstest((white**2).sum(1), stats.chi2(size).cdf).pvalue,
    ]
    values += [stats.kstest((x[:, i] - mean[i]) / covariance[i, i] ** 0.5, "norm").pvalue for i in range(size)]
    directions = np.random.default_rng(0).normal(size=(size, 6))
    values += [stats.kstest(white @ (v / np.linalg.norm(v)), "norm").pvalue for v in directions.T]
    return float(min(values))


def with_std(target: LinearGaussian, std: Tensor) -> LinearGaussian:
    """`target` with another noise; its distribution is that of the noise it was made with."""
    target.sampler = replace(target.sampler, std=std)
    return target
