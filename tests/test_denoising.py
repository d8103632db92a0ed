"""The sampler of continuous tokens: diffusers' own steps, the last one's noise, and what cannot be sampled."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy import stats

from polyspec.denoising import Sampler, gaussian_noise
from polyspec.errors import ConfigError, InputError, UnsupportedModelError


def scheduler(**config) -> DDPMScheduler:
    return DDPMScheduler(**{"variance_type": "fixed_large", "timestep_spacing": "trailing", **config})


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_means_and_deviations_are_those_of_the_schedulers_own_step(
    prediction: str, variance: str, spacing: str
) -> None:
    ddpm = scheduler(prediction_type=prediction, variance_type=variance, timestep_spacing=spacing)
    sampler = Sampler.from_scheduler(ddpm, 10)
    x, output = torch.randn(2, 3, 5)
    for step, time in enumerate(sampler.timesteps.tolist()):
        mean = sampler.mean(output, x, torch.full((3,), step))
        taken = ddpm.step(output, time, x, generator=torch.Generator().manual_seed(0)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        std = sampler.std[step] if time > 0 else 0.0  # at timestep 0 diffusers leaves the noise out, we do not
        torch.testing.assert_close(mean + std * noise, taken, atol=2e-5, rtol=1e-4)
        clean = sampler.clean(mean, x, torch.full((3,), step))
        torch.testing.assert_close(sampler.mean_of(clean, x, torch.full((3,), step)), mean)


def test_the_last_step_keeps_its_noise_where_the_variance_has_any() -> None:
    assert Sampler.from_scheduler(scheduler(), 10).std[-1] > 0
    assert Sampler.from_scheduler(scheduler(timestep_spacing="leading"), 10).std[-1] > 0
    assert float(Sampler.from_scheduler(scheduler(variance_type="fixed_small"), 10, last_std=0.25).std[-1]) == 0.25


def test_a_deterministic_last_step_is_refused_with_the_reason() -> None:
    sampler = Sampler.from_scheduler(scheduler(variance_type="fixed_small"), 10)
    with pytest.raises(ConfigError, match=r"last step is deterministic.*fixed_large"):
        sampler.check_noise()


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_a_number_of_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(ConfigError, match="denoising steps"):
        Sampler.from_scheduler(scheduler(), steps)


def test_other_samplers_and_learned_variances_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="DDPMScheduler"):
        Sampler.from_scheduler(DDIMScheduler(), 10)
    with pytest.raises(UnsupportedModelError, match="one covariance"):
        Sampler.from_scheduler(scheduler(variance_type="learned"), 10)
    with pytest.raises(ConfigError, match="last_std"):
        Sampler.from_scheduler(scheduler(), 10, last_std=-1.0)


def test_samplers_that_do_not_fit_together_are_told_apart() -> None:
    ten = Sampler.from_scheduler(scheduler(), 10)
    with pytest.raises(InputError, match="in 5 steps, the target in 10"):
        ten.check_same(Sampler.from_scheduler(scheduler(), 5))
    with pytest.raises(InputError, match="covariances of draft and target differ"):
        ten.check_same(Sampler.from_scheduler(scheduler(), 10, last_std=0.5))


def test_noise_is_gaussian_and_a_function_of_row_seed_and_index() -> None:
    seeds, index = torch.arange(500), torch.arange(40).expand(500, -1)
    noise = gaussian_noise(seeds, index, 6)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-6
    assert torch.equal(gaussian_noise(seeds[7:8], index[7:8, 3:9], 6), noise[7:8, 3:9])
