"""`LatentImageModel` as a target: its cache, its prompts, guidance inside the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyspec.cache import RaggedCache
from polyspec.modalities.image.continuous.model import LatentImageModel


class LatentTarget:
    """A ContinuousTarget. Prompts are token id lists, `<s> words <boi>`; under guidance every row has a second stream in
    which the words are left out, and both streams go through every call together."""

    def __init__(self, model: LatentImageModel, guidance_scale: float = 1.0):
        self.model, self.guidance = model, guidance_scale
        self.device = model.device
        self.dim, self.sampler = model.config.latent_dim, model.sampler().to(self.device)
        self.size = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            self.times = model.head.times(self.sampler.timesteps)  # [T, size]

    @torch.no_grad()
    def prefill(self, prompt: Sequence[Sequence[int]], capacity: int) -> None:
        rows = [list(p) for p in prompt]
        if self.guidance != 1:
            rows += [[p[0], p[-1]] for p in rows]
        self.rows = len(prompt)
        self.before = [len(p) - 1 for p in rows]  # slots count from each prompt's last token
        self.last = torch.tensor([p[-1] for p in rows], device=self.device)
        longest = max(self.before)
        self.cache = RaggedCache(len(rows), longest + capacity + 64)
        ids = torch.tensor([p[:-1] + [0] * (longest - len(p) + 1) for p in rows], device=self.device)
        self.run(self.model.transformer.embed_tokens(ids))
        self.rollback([0] * self.rows)

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        model, streams = self.model, len(self.before)
        start = torch.tensor([n - b for n, b in zip(self.cache.lengths, self.before, strict=True)], device=self.device)
        slot = start[:, None] + torch.arange(latents.shape[1], device=self.device)
        image = model.enter(latents.to(model.dtype)).repeat(streams // self.rows, 1, 1)
        word = model.transformer.embed_tokens(self.last)[:, None]
        at = model.places(slot.clamp(max=model.config.image_tokens - 1))
        hidden = self.run(torch.where((slot > 0)[..., None], image, word) + at)
        return self.conditions(hidden.unflatten(0, (streams // self.rows, self.rows)).movedim(0, 2))

    def conditions(self, hidden: Tensor) -> Tensor:
        """What `means` takes of hidden states `[B, W, G, C]`, for all T denoising steps: `[B, W, T, G, blocks, 3·size]`."""
        return self.model.head.modulations(hidden.unsqueeze(2), self.times[:, None])

    def run(self, embeds: Tensor) -> Tensor:
        """Hidden states `[S, T, C]` of embeddings behind what the cache keeps."""
        width, streams = embeds.shape[1], len(self.before)
        layout = self.cache.layout(width, None, self.device)
        mask = layout.visible[:, None].expand(streams, -1, -1, -1)
        positions = (layout.base + layout.depth).expand(streams, -1)
        out = self.model.transformer(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state

    def rollback(self, slots: Sequence[int]) -> None:
        every = [*slots] * (len(self.before) // self.rows)
        self.cache.rollback([b + n for b, n in zip(self.before, every, strict=True)])

    @torch.no_grad()
    def means(self, condition: Tensor, x: Tensor, step: Tensor) -> Tensor:
        lead = condition.shape[:-4]
        row = torch.arange(lead.numel(), device=step.device).view(lead).expand(step.shape)
        modulations = condition.flatten(0, len(lead) - 1)[row, step]  # [.., G, blocks, 3·size]
        out = self.model.head.denoise(x[..., None, :].to(self.model.dtype), modulations).float()  # [.., G, D]
        if self.guidance != 1:
            out = out[..., 1, :] + self.guidance * (out[..., 0, :] - out[..., 1, :])
        else:
            out = out[..., 0, :]
        return self.sampler.mean(out, x, step)
