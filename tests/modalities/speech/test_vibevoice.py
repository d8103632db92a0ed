"""VibeVoice as a target of continuous tokens: its own generate's latents, whatever is drafted and rejected in between."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VibeVoiceConfig, VibeVoiceForConditionalGeneration

from polyspec.decoding.continuous import Continuous, Latents
from polyspec.denoising import ContinuousTarget, gaussian_noise
from polyspec.drafting.base import NoDraft
from polyspec.drafting.continuous import LatentContext, LatentDraftModel
from polyspec.errors import PolyspecError
from polyspec.lengths import Fixed
from polyspec.metrics import LatentStats
from polyspec.modalities.speech.vibevoice import VibeVoice
from polyspec.verification import reflection_chain

STEPS, TOKENS = 5, 6
AUDIO, BOS, EOS = 3, 4, 5
PROMPTS = [[7, 9, 11, BOS], [8, 10, 12, BOS]]


@cache
def model(seed: int = 0) -> VibeVoiceForConditionalGeneration:
    torch.manual_seed(seed)
    sound = {"num_filters": 4, "downsampling_ratios": [2, 3], "depths": [1, 1, 1], "kernel_size": 3}
    sound |= {"layer_scale_init_value": 0.5}
    text = {"model_type": "qwen2", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = VibeVoiceConfig(
        audio_config={"model_type": "vibevoice_acoustic_tokenizer", "hidden_size": 4, **sound},
        semantic_model_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", "hidden_size": 6, **sound},
        text_config=text,
        diffusion_head_config={"num_hidden_layers": 2, "intermediate_size": 48, "frequency_embedding_size": 16},
        audio_token_id=AUDIO,
        audio_bos_token_id=BOS,
        audio_eos_token_id=EOS,
        eos_token_id=6,
        pad_token_id=0,
    )
    made = VibeVoiceForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in made.named_parameters():
        if weight.dim() > 1 or "bias" in name:
            weight.data += 0.15 * torch.randn(weight.shape, generator=generator)
    made.model.latent_scaling_factor.data.fill_(1.3)
    made.model.latent_bias_factor.data.fill_(0.2)
    made.lm_head.weight.data.zero_()  # a tie: the lowest of the allowed ids, that for speech
    return made


def draw(guidance: float, draft: Any = None, window: int = 1, length: int = 2, tokens: int = TOKENS, voice: Any = None):
    voice = voice or VibeVoice(model(), steps=STEPS)
    target = voice.latent_target(guidance)
    sequences, seeds, stats = Latents(2, tokens, target.dim, target.device), torch.tensor([11, 12]), LatentStats()
    generator = torch.Generator().manual_seed(0)
    context = LatentContext(target, PROMPTS, sequences, seeds, generator, Fixed(length), stats, guidance)
    drafter = NoDraft() if draft is None else LatentDraftModel(draft)
    with torch.no_grad():
        Continuous(reflection_chain, window=window).run(context, drafter)
    return sequences.result(), stats, target


class Ours:
    """A scheduler for transformers' own loop that steps as our sampler does, with our noise."""

    def __init__(self, voice: VibeVoice, seeds: Tensor, dim: int):
        self.sampler, self.token, self.dim, self.seeds = voice.sampler, -1, dim, seeds
        self.timesteps = voice.sampler.timesteps

    def noise(self) -> Tensor:
        index = self.token * (STEPS + 1) + torch.arange(STEPS + 1)
        return gaussian_noise(self.seeds, index.expand(len(self.seeds), -1), self.dim)

    def first(self, *shape: Any, **kwargs: Any) -> Tensor:
        self.token += 1
        self.at = 0
        return self.noise()[:, 0].repeat(2, 1)

    def set_timesteps(self, num_inference_steps: int) -> None:
        pass

    def step(self, output: Tensor, timestep: Tensor, x: Tensor) -> Any:
        half = len(x) // 2
        at = torch.full((half,), self.at)
        self.at += 1
        x = self.sampler.mean(output[:half], x[:half], at) + self.sampler.std[at, None] * self.noise()[:, self.at]
        self.latents = x
        return type("Out", (), {"prev_sample": x.repeat(2, 1)})()


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_plain_loop_says_what_transformers_generate_says_with_the_same_noise(guidance: float, monkeypatch) -> None:
    voice = VibeVoice(model(), steps=STEPS)
    latents, stats, _ = draw(guidance)
    ours = Ours(voice, torch.tensor([11, 12]), 4)
    monkeypatch.setattr("transformers.models.vibevoice.generation_vibevoice.torch.randn", ours.first)
    sound = model().generate(
        torch.tensor(PROMPTS),
        attention_mask=torch.ones(2, 4, dtype=torch.long),
        noise_scheduler=ours,
        num_diffusion_steps=STEPS,
        guidance_scale=guidance,
        max_new_tokens=TOKENS,
        do_sample=False,
    )
    monkeypatch.undo()
    torch.testing.assert_close(latents[:, -1], ours.latents, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(voice.waveform(latents), torch.stack(list(sound)), atol=1e-4, rtol=1e-3)
    assert stats.target_calls == TOKENS


def test_conditions_are_the_same_whatever_was_drafted_and_rolled_back() -> None:
    voice, tokens = VibeVoice(model(), steps=STEPS), torch.randn(2, 12, 4)
    with torch.no_grad():
        once = voice.latent_target(1.5)
        once.prefill(PROMPTS, 12)
        fed = torch.cat([torch.zeros(2, 1, 4), tokens], dim=1)
        whole = once.forward(fed)
        target = voice.latent_target(1.5)
        assert isinstance(target, ContinuousTarget)
        target.prefill(PROMPTS, 12)
        kept = [0, 0]
        for width, keep in ((3, [1, 3]), (1, [1, 1]), (4, [2, 0]), (2, [2, 2]), (3, [1, 2]), (3, [3, 1])):
            slots = torch.tensor(kept)[:, None] + torch.arange(width)
            wrong = torch.arange(width) >= torch.tensor(keep)[:, None]  # what will be rejected is something else
            latents = fed.gather(1, slots[..., None].expand(-1, -1, 4)) + 5 * wrong[..., None]
            found = target.forward(latents)
            expected = whole.gather(1, slots[..., None, None].expand_as(found))
            right = ~wrong
            torch.testing.assert_close(found[right], expected[right], atol=1e-4, rtol=1e-3)
            kept = [n + k for n, k in zip(kept, keep, strict=True)]
            target.rollback(kept)


def test_caches_that_are_not_rolled_back_are_caught(monkeypatch) -> None:
    monkeypatch.setattr("polyspec.modalities.speech.vibevoice.copied", lambda cache: cache)
    with pytest.raises(AssertionError):
        test_conditions_are_the_same_whatever_was_drafted_and_rolled_back()


def test_a_draft_that_is_the_target_is_kept_and_the_same_seed_gives_the_same_speech() -> None:
    voice = VibeVoice(model(), steps=STEPS)
    found, stats, _ = draw(1.5, draft=voice)
    again, _, _ = draw(1.5, draft=voice)
    assert torch.equal(found, again) and stats.acceptance_rate > 0.95 and stats.target_calls == 2
    small, stats, _ = draw(1.5, draft=VibeVoice(model(1), steps=STEPS), window=3)
    assert small.isfinite().all() and stats.acceptance_rate < 0.95


def test_speech_ends_where_the_language_model_says_so() -> None:
    voice = VibeVoice(model(), steps=STEPS)
    latents, _, target = draw(1.0)
    assert target.spoken([TOKENS, TOKENS]) == [TOKENS, TOKENS]
    target.speaks[1, 2] = False
    assert target.spoken([TOKENS, TOKENS]) == [TOKENS, 2]
    assert voice.waveform(latents).shape == (2, 1, TOKENS * 6)


@pytest.mark.parametrize("recipe", ["autoregressive", "reflection", "cspd"])
def test_every_recipe_speaks(recipe: str) -> None:
    voice = VibeVoice(model(), steps=STEPS)
    knobs = {} if recipe == "autoregressive" else {"draft_model": VibeVoice(model(1), steps=STEPS), "length": 2}
    result = voice.speak(PROMPTS, recipe=recipe, overrides=knobs, max_new_tokens=4, seed=3)
    assert [o.waveform.shape for o in result.outputs] == [(1, 24)] * 2 and result.stats.recipe == recipe
    again = voice.speak(PROMPTS, recipe=recipe, overrides=knobs, max_new_tokens=4, seed=3)
    assert torch.equal(result.outputs[1].waveform, again.outputs[1].waveform)


def test_what_cannot_be_coupled_is_refused() -> None:
    from diffusers import DPMSolverMultistepScheduler

    with pytest.raises(PolyspecError, match="not a stochastic DDPM sampler"):
        VibeVoice(model(), DPMSolverMultistepScheduler(), STEPS)
    with pytest.raises(PolyspecError, match="is not a VibeVoice model"):
        VibeVoice(torch.nn.Linear(1, 1))
    with pytest.raises(PolyspecError, match="the number of denoising steps"):
        VibeVoice(model(), steps=0)
    with pytest.raises(PolyspecError, match="opens speech"):
        VibeVoice(model(), steps=STEPS).speak([[7, 8]])
    with pytest.raises(PolyspecError, match="is for discrete tokens"):
        VibeVoice(model(), steps=STEPS).speak(PROMPTS, recipe="sjd")
    with pytest.raises(PolyspecError, match="max_new_tokens must be"):
        VibeVoice(model(), steps=STEPS).speak(PROMPTS, max_new_tokens=0)
    with pytest.raises(PolyspecError, match="denoises in 3 steps"):
        draw(1.0, draft=VibeVoice(model(1), steps=3))
