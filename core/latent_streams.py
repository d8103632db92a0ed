"""What targets of continuous tokens have in common: prompts and guidance pairs as streams of one cache with ragged rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from polyspec.api import generator_of
from polyspec.cache import RaggedCache
from polyspec.decoding.continuous import Continuous, Latents
from polyspec.denoising import Sampler
from polyspec.distributions import row_seeds
from polyspec.drafting.continuous import LatentContext
from polyspec.laid_out import Layers, laid_out, using
from polyspec.metrics import LatentStats
from polyspec.recipe import Method


class LatentStreams:
    """Most of a ContinuousTarget. Prompts are token id lists; under guidance every row has a second stream with the prompt
    that `bare` makes of it, and both go through every call together.

    backbone: a decoder of transformers that takes embeddings. A subclass says how words and latents are embedded, what
    `means` needs of hidden states, and calls the head.
    """

    dim: int
    sampler: Sampler
    backbone: Any
    head: Any
    """The module that `predict` calls."""
    linears: Layers = ()
    head_linears: Layers = ()

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int, guidance_scale: float = 1.0):
        self.device, self.dtype, self.size, self.guidance = device, dtype, size, guidance_scale

    def bare(self, prompt: list[int]) -> list[int]:
        """The prompt that guidance leads away from."""
        raise NotImplementedError

    def embed_words(self, ids: Tensor) -> Tensor:
        """Token ids `[..]` -> `[.., C]`."""
        raise NotImplementedError

    def embed_latents(self, latents: Tensor, slot: Tensor) -> Tensor:
        """Latents `[B, T, D]` in slots `[B, T]` (slot 0 holds none) -> `[B, T, C]`."""
        raise NotImplementedError

    def conditions(self, hidden: Tensor) -> Tensor:
        """What `means` takes of hidden states `[B, T, G, C]`."""
        raise NotImplementedError

    def predict(self, condition: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """The head's output `[.., G, D]` at x `[.., D]`, steps `[..]`; condition as `conditions` makes it, its leading
        dimensions broadcast to step's."""
        raise NotImplementedError

    @torch.no_grad()
    def prefill(self, prompt: Sequence[Sequence[int]], capacity: int) -> None:
        self.linears, self.head_linears = laid_out(self.backbone), laid_out(self.head)
        rows = [list(p) for p in prompt]
        if self.guidance != 1:
            rows += [self.bare(p) for p in rows]
        self.rows = len(prompt)
        self.before = [len(p) - 1 for p in rows]  # slots count from each prompt's last token
        self.last = torch.tensor([p[-1] for p in rows], device=self.device)
        longest = max(self.before)
        self.cache = RaggedCache(len(rows), longest + capacity + 64)
        if longest:
            ids = torch.tensor([p[:-1] + [0] * (longest - len(p) + 1) for p in rows], device=self.device)
            self.run(self.embed_words(ids))
            self.rollback([0] * self.rows)

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        streams = len(self.before) // self.rows
        kept = [n - b for n, b in zip(self.cache.lengths, self.before, strict=True)]
        slot = torch.tensor(kept[: self.rows], device=self.device)[:, None] + torch.arange(
            latents.shape[1], device=self.device
        )
        image = self.embed_latents(latents.to(self.dtype), slot).repeat(streams, 1, 1)
        word = self.embed_words(self.last)[:, None] + 0 * image[:, :, :1]
        hidden = self.run(torch.where((slot == 0).repeat(streams, 1)[..., None], word, image))
        return self.conditions(hidden.unflatten(0, (streams, self.rows)).movedim(0, 2))

    def run(self, embeds: Tensor) -> Tensor:
        """Hidden states `[S, T, C]` of embeddings behind what the cache keeps."""
        width, streams = embeds.shape[1], len(self.before)
        layout = self.cache.layout(width, None, self.device)
        mask = layout.visible[:, None].expand(streams, -1, -1, -1)
        positions = (layout.base + layout.depth).expand(streams, -1)
        with using(self.linears):
            out = self.backbone(
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
        with using(self.head_linears):
            out = self.predict(condition, x.to(self.dtype), step).float()
        if self.guidance != 1:
            out = out[..., 1, :] + self.guidance * (out[..., 0, :] - out[..., 1, :])
        else:
            out = out[..., 0, :]
        return self.sampler.mean(out, x, step)


def draw_latents(
    method: Method,
    loop: Continuous,
    target: Any,
    prompts: Sequence[Sequence[int]],
    limit: int,
    *,
    seed: int | Sequence[int] | None,
    guidance: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, LatentStats]:
    """`limit` tokens of every prompt by a recipe's `method` and `loop`: `[B, limit, D]`, and counts."""
    stats = LatentStats(recipe=method.recipe.name, guarantee=method.recipe.guarantee)
    start = time.perf_counter()
    seeds = row_seeds(seed, len(prompts), target.device)
    sequences = Latents(len(prompts), limit, target.dim, target.device, progress)
    generator, length = generator_of(seeds), copy(method.length)
    loop.run(LatentContext(target, prompts, sequences, seeds, generator, length, stats, guidance), method.drafter())
    stats.wall_seconds = time.perf_counter() - start
    return sequences.result(), stats
