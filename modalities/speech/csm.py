"""CSM: a backbone over time says a frame's first code, a depth decoder the others, each from those before it.

Sesame's Conversational Speech Model. With h_t the backbone's last hidden state at frame t - 1 (or the prompt's end), codes
c_1 … c_K of frame t and D the depth decoder,

    p(c_1) = softmax(W h_t),    p(c_k) = softmax(W_k D(h_t, c_1 … c_{k-1})_k),    k = 2 … K.

Drafts may stay within a frame, then the depth decoder alone checks them, or go over several: the backbone runs once over
the frames they complete, the depth decoder once over all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from polyspec.errors import ConfigError
from polyspec.guidance import Guidance
from polyspec.modalities.speech.frames import FramedSpeech, FrameTarget
from polyspec.target import Output, Target


class DepthDecoder(Target):
    """CSM's depth decoder: place 0 of a row holds the state that its frame is said from, place k the frame's code k."""

    state: Tensor  # [S, d], of the rows' frames

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        """Logits of code k + 1 at place k. The model's own forward takes all rows to be at one place."""
        positions = positions.expand(tokens.shape)
        model: Any = self.model
        inner = model.model
        embeds = inner.embed_tokens(tokens + (positions - 1).clamp(min=0) * inner.vocab_size)
        embeds = torch.where((positions == 0)[..., None], self.state[:, None].to(embeds.dtype), embeds)
        hidden = inner.inputs_embeds_projector(embeds)
        rotary = inner.rotary_emb(hidden, position_ids=positions)
        for layer in inner.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        return self.heads(inner.norm(hidden), positions), None

    def heads(self, hidden: Tensor, places: Tensor) -> Tensor:
        """`hidden [S, T, d]` at `places [S, T]` to logits `[S, T, V]`: every place but 0 has an output matrix of its own."""
        assert self.cache is not None
        head: Any = self.model.codebooks_head
        low = max(min(self.cache.lengths), 1)
        count = max(self.cache.longest + places.shape[1] - low, 0)
        index = (places - low + 1).clamp(min=0)[..., None]  # of rows that stand at different places; 0: place 0
        spread = hidden.new_zeros(len(hidden), count + 1, hidden.shape[2])
        spread.scatter_(1, index.expand_as(hidden), hidden)
        logits = torch.einsum("std,tdv->stv", spread[:, 1:], head.weight[low - 1 : low - 1 + count])
        return pad(logits, (0, 0, 1, 0)).gather(1, index.expand(-1, -1, logits.shape[2]))


class CsmTarget(FrameTarget):
    """CsmForConditionalGeneration."""

    def __init__(self, model: PreTrainedModel, guidance: Guidance | None = None, hidden_layers: Sequence[int] = ()):
        super().__init__(model, guidance, hidden_layers)
        config = self.model.config
        self.frame, self.codes, self.texts = config.num_codebooks, config.vocab_size, config.text_vocab_size
        self.depth = DepthDecoder(self.model.depth_decoder)  # a row's frame under way
        self.wide = DepthDecoder(self.model.depth_decoder)  # frames that drafts go on to, not kept

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, **rest: Any) -> Output | None:
        if self.guidance is not None:
            raise ConfigError("CSM speaks without guidance; leave guidance_scale out")
        output = super().prefill(tokens, mask, **rest)
        self.depth.open(self.rows, self.frame)
        self.inner = [(-1, 0)] * self.rows  # which frame the depth decoder's cache holds, and how many places of it
        return output

    def rollback(self, lengths: Sequence[int], running: Sequence[bool] | None = None) -> None:
        super().rollback(lengths, running)
        for row, (frame, places) in enumerate(self.inner):
            said = self.kept[row] - self.begun[row] - frame * self.frame
            self.inner[row] = (frame, 0 if said < 0 else min(places, said + 1))

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        columns = tokens if tokens.dim() == 3 else pad(tokens[..., None], (0, self.frame - 1))
        text = columns[..., :1] - self.codes
        frames = self.model.backbone_model.embed_tokens(columns.clamp(max=self.codes - 1))
        out = self.model.backbone_model(
            inputs_embeds=torch.where(text >= 0, self.model.embed_text_tokens(text[..., 0].clamp(min=0)), frames),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state, None

    def within(self, first: Sequence[int], width: int, end: Sequence[int]) -> Tensor:
        states = self.states_before(first, width)
        start = torch.tensor(first, device=states.device)[:, None]
        codes = self.frames(start + torch.arange(width, device=start.device))
        logits = [self.under_way(first, codes[:, 0], states[:, 0], end)[:, None]]
        if width > 1:
            rows = self.rows * (width - 1)
            self.wide.open(rows, self.frame)
            self.wide.state = states[:, 1:].flatten(0, 1)
            inputs = pad(codes[:, 1:, :-1], (1, 0)).flatten(0, 1)
            logits.append(self.wide.run(inputs, None, keep_logits=True).logits.unflatten(0, (-1, width - 1)))
        others = torch.cat(logits, dim=1)
        return torch.cat([self.model.lm_head(states)[:, :, None], others[:, :, 1:]], dim=2)

    def under_way(self, first: Sequence[int], codes: Tensor, states: Tensor, end: Sequence[int]) -> Tensor:
        """Logits `[B, K, V]` of the codes, up to `end[b]`, of the rows' frames `first[b]`, of which `codes [B, K]` are
        known. Those of the first code, and of what the depth decoder's cache holds, are not given."""
        until = [min(e, self.frame - 1) + 1 if e > 0 else 0 for e in end]
        have = [places if frame == f else 0 for f, (frame, places) in zip(first, self.inner, strict=True)]
        count = max(u - h for u, h in zip(until, have, strict=True))
        logits = states.new_zeros(self.rows, self.frame, self.codes)
        if count <= 0:
            return logits
        # every row runs as many places, some of them once more
        start = [max(u - count, 0) for u in until]
        assert self.depth.cache is not None
        self.depth.cache.rollback(start)
        self.depth.state = states
        place = torch.tensor(start, device=codes.device)[:, None] + torch.arange(count, device=codes.device)
        tokens = pad(codes, (1, 0)).gather(1, place)
        found = self.depth.run(tokens, None, keep_logits=True).logits
        self.inner = list(zip(first, until, strict=True))
        return logits.scatter(1, place[..., None].expand_as(found), found)


class CsmSpeech(FramedSpeech):
    """Reads a text as speaker 0. The knobs hold for the backbone and the depth decoder alike."""

    loads = "CsmForConditionalGeneration"
    speaks = CsmTarget
    prompt = "[0]{text}"
    reading = MappingProxyType({"add_special_tokens": True})

    def __init__(self, model: PreTrainedModel, processor: Any):
        super().__init__(model, processor)
        self.sample_rate = self.model.config.codec_config.sampling_rate

    def ends(self, frame: Tensor) -> bool:
        return bool((frame[:-1] == self.model.config.codebook_eos_token_id).all())

    def wave(self, frames: Tensor) -> Tensor:
        frames = frames[:-1] if self.ends(frames[-1]) else frames
        if not len(frames):
            return torch.zeros(0)
        codec = self.model.codec_model
        codes = frames.T[None].clamp(max=codec.config.codebook_size - 1).to(codec.device)
        return codec.decode(codes).audio_values[0, 0]

    def own(self, inputs: Any, frames: int, knobs: dict[str, Any]) -> Tensor:
        return super().own(inputs, frames, {**knobs, **{f"depth_decoder_{k}": v for k, v in knobs.items()}})
