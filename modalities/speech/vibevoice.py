"""VibeVoice (2508.19205): speech as continuous latents, one diffusion head call a denoising step, 7.5 latents a second.

Every latent goes back into the language model as heard: decoded to sound, and that encoded again by the semantic tokenizer,
both by causal convolutions with caches. Drafted latents are decoded on copies of these caches, so that a rejection leaves no
trace in them.

The model's own solver (DPM-Solver++) is deterministic: nothing drafted through it could be kept. Here diffusers' DDPMScheduler
takes its place, with the noise schedule that the model was trained on: samples of the same learnt distribution, for which
DDPM needs more steps than the solver's 10 for equal sound, and whose last step keeps its noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from polyspec.decoding.continuous import Continuous
from polyspec.denoising import Sampler
from polyspec.errors import ConfigError, InputError, UnsupportedModelError
from polyspec.latent_streams import LatentStreams, draw_latents
from polyspec.lengths import positive
from polyspec.outputs import Audio, Result
from polyspec.recipe import build, find_recipe
from polyspec.verification import reflection_chain

RATE = 24_000  # samples a second
SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_large",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


class VibeVoice:
    """A VibeVoiceForConditionalGeneration with its sampler, as target or draft model (`draft_model=VibeVoice(small)`).

    scheduler: diffusers' DDPMScheduler (None: the training schedule); steps: denoising steps; last_std: deviation of the
    last step's noise (None: the scheduler's). Raises UnsupportedModelError for other models and schedulers.
    """

    def __init__(self, model: Any, scheduler: Any = None, steps: int = 20, last_std: float | None = None):
        inner = getattr(model, "model", None)
        if not all(hasattr(inner, n) for n in ("diffusion_head", "audio_tower", "semantic_tokenizer_encoder")):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a VibeVoice model; give a VibeVoiceForConditionalGeneration"
            )
        self.model = model
        self.sampler = Sampler.from_scheduler(scheduler or DDPMScheduler(**SCHEDULER), steps, last_std)

    def latent_target(self, guidance_scale: float = 1.0) -> VibeVoiceTarget:
        """What a loop needs of this model."""
        return VibeVoiceTarget(self.model, self.sampler, guidance_scale)

    @torch.no_grad()
    def speak(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        recipe: str = "reflection",
        overrides: Mapping[str, Any] | None = None,
        max_new_tokens: int = 256,
        guidance_scale: float = 1.3,
        seed: int | Sequence[int] | None = None,
    ) -> Result:
        """Say what `prompts`, token ids that end with the token that opens speech, ask for: an Audio each in `outputs`.

        recipe: reflection, cspd or autoregressive; overrides: its knobs, `draft_model=VibeVoice(…)` among them. Rows are
        drawn to `max_new_tokens` latents, and what lies behind the place where speech ends is cut off.
        """
        if not prompts or any(len(p) == 0 or p[-1] != self.model.config.audio_bos_token_id for p in prompts):
            raise InputError("every prompt must end with the token that opens speech (audio_bos_token_id)")
        if guidance_scale < 1:
            raise ConfigError(f"guidance_scale must be ≥ 1, got {guidance_scale}")
        method = build(find_recipe(recipe), overrides or {})
        loop: Any = Continuous(reflection_chain) if recipe == "autoregressive" else method.loop
        if not isinstance(loop, Continuous):
            raise ConfigError(f"recipe {recipe!r} is for discrete tokens; choose reflection, cspd or autoregressive")
        target = self.latent_target(guidance_scale)
        limit = positive("max_new_tokens", max_new_tokens)
        latents, stats = draw_latents(method, loop, target, prompts, limit, seed=seed, guidance=guidance_scale)
        ends = target.spoken([limit] * len(prompts))
        hop = self.model.config.audio_config.hop_length
        sounds = self.waveform(latents).float().cpu()
        return Result([Audio(w[:, : n * hop], RATE) for w, n in zip(sounds, ends, strict=True)], stats)

    @torch.no_grad()
    def waveform(self, latents: Tensor) -> Tensor:
        """Sound `[B, channels, samples]` of latents `[B, L, D]`."""
        return self.model.model.audio_tower.decode(unscaled(self.model.model, latents)).audio


class VibeVoiceTarget(LatentStreams):
    """A ContinuousTarget. Prompts end with the token that opens speech; without guidance's second stream at scale 1.

    `speaks [B, capacity + 1]`: whether the language model goes on speaking after each slot; what was drawn behind the first
    slot where it does not is to be cut off (see `spoken`).
    """

    def __init__(self, model: Any, sampler: Sampler, guidance_scale: float = 1.0):
        super().__init__(model.device, model.dtype, sum(p.numel() for p in model.parameters()), guidance_scale)
        self.model, self.backbone, self.head = model, model.model.language_model, model.model.diffusion_head
        self.sampler = sampler.to(model.device)
        self.dim = model.config.audio_config.hidden_size
        config = model.config
        allowed = [config.audio_bos_token_id, config.audio_eos_token_id, config.audio_token_id, config.eos_token_id]
        self.allowed = torch.tensor(sorted(set(allowed)), device=self.device)

    def prefill(self, prompt: Sequence[Sequence[int]], capacity: int) -> None:
        self.feedback = Feedback(self.model.model, len(prompt), capacity + 64, self.dim)
        self.speaks = torch.ones(len(prompt), capacity + 64, dtype=torch.bool, device=self.device)
        super().prefill(prompt, capacity)

    def bare(self, prompt: list[int]) -> list[int]:
        return [self.model.config.audio_bos_token_id]

    def embed_words(self, ids: Tensor) -> Tensor:
        return self.backbone.embed_tokens(ids)

    def embed_latents(self, latents: Tensor, slot: Tensor) -> Tensor:
        self.slot = slot
        return self.model.model.multi_modal_projector(latents) + self.feedback.heard(latents, slot)

    def conditions(self, hidden: Tensor) -> Tensor:
        """The hidden states; notes where speech ends."""
        logits = hidden[:, :, 0] @ self.model.lm_head.weight[self.allowed].T
        self.speaks.scatter_(1, self.slot, self.allowed[logits.argmax(-1)] == self.model.config.audio_token_id)
        return hidden

    def predict(self, condition: Tensor, x: Tensor, step: Tensor) -> Tensor:
        streams = condition.shape[-2]
        shape = (*step.shape, streams)
        x, condition = x.unsqueeze(-2).expand(*shape, -1), condition.expand(*shape, -1)
        times = self.sampler.timesteps[step].unsqueeze(-1).expand(shape).to(x.dtype)
        out = self.model.model.diffusion_head(x.flatten(0, -2), times.flatten(), condition=condition.flatten(0, -2))
        return out.view(*shape, -1)

    def spoken(self, lengths: Sequence[int]) -> list[int]:
        """How many of each row's `lengths[b]` latents the language model meant to speak."""
        ends = self.speaks.logical_not().int()
        return [min(n, int(e.argmax()) if e.any() else n) for n, e in zip(lengths, ends, strict=True)]


class Feedback:
    """What the language model hears of latents, through decoder and semantic encoder with convolution caches.

    history `[B, capacity, D]` holds the latent of every slot (slot 0: none). The caches stand at slot `base`: all before it is
    kept in every row. What is drafted goes through copies.
    """

    def __init__(self, model: Any, rows: int, capacity: int, dim: int):
        self.model, self.base = model, 1
        self.history = torch.zeros(rows, capacity, dim, device=model.device, dtype=model.dtype)
        self.caches: tuple[Any, Any] = (None, None)
        self.ahead: tuple[int, tuple[Any, Any]] | None = None  # caches behind the last drafts, and their slot

    def heard(self, latents: Tensor, slot: Tensor) -> Tensor:
        """`[B, T, C]` of latents `[B, T, D]` in slots `[B, T]`; every row's earlier slots are kept."""
        self.history.scatter_(1, slot[..., None].expand_as(latents), latents)
        lowest, end = max(1, int(slot[:, 0].min())), int(slot[:, -1].max()) + 1
        if self.ahead is not None and self.ahead[0] == lowest:
            self.base, self.caches = self.ahead  # everything was kept, and rows are abreast
        elif lowest > self.base:
            _, self.caches = self.listen(self.history[:, self.base : lowest], self.caches)
            self.base = lowest
        if end <= self.base:
            return self.model.semantic_connector.linear_2.bias.expand(*slot.shape, -1)  # slot 0 alone: not looked at
        features, behind = self.listen(self.history[:, self.base : end], tuple(copied(c) for c in self.caches))
        self.ahead = (end, behind)
        index = (slot - self.base).clamp(min=0)
        return features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))

    def listen(self, latents: Tensor, caches: Any) -> tuple[Tensor, tuple[Any, Any]]:
        """Features `[B, T, C]` of latents `[B, T, D]` behind what `caches` hold, which are moved on."""
        sound = self.model.audio_tower.decode(unscaled(self.model, latents), padding_cache=caches[0], use_cache=True)
        found = self.model.semantic_tokenizer_encoder(sound.audio, padding_cache=caches[1], use_cache=True)
        return self.model.semantic_connector(found.latents), (sound.padding_cache, found.padding_cache)


def unscaled(model: Any, latents: Tensor) -> Tensor:
    """Latents as the audio tower has them."""
    return latents.to(model.dtype) / model.latent_scaling_factor - model.latent_bias_factor


def copied(cache: Any) -> Any:
    """A padding cache that can be moved on without moving this one."""
    if cache is None:
        return None
    twin = copy(cache)
    twin.layers = {}
    for name, layer in cache.layers.items():
        twin.layers[name] = copy(layer)
        twin.layers[name].cache = layer.cache.clone()
    return twin
