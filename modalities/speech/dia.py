"""Dia: C channels in delayed columns, said by a decoder that attends to the text's encoding, guided.

Nari Labs' model. Channel c's stream runs d_c columns behind the first's; the first says where speech ends, the others end
d_c columns later. transformers' own processors count that in a state which every call moves on; here it is worked out from
the columns themselves, for every drafted prefix, so there is nothing to be put back after a rejection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from polyspec.decoding.sequences import Sequences
from polyspec.errors import InputError
from polyspec.guidance import Guidance
from polyspec.modalities.speech.frames import ColumnTarget, FramedSpeech, force, said_with
from polyspec.target import Output

TOP_K = 50
"""What guidance leaves of the codes where nothing is said: transformers' default."""


def guide(conditional: Tensor, unconditional: Tensor, scale: float, top_k: int = TOP_K) -> Tensor:
    """Dia's classifier-free guidance of logits `[.., V]`: the `top_k` likeliest codes by c + s·(c - u) are left, and
    weighed by the conditional logits c alone."""
    guided = conditional + scale * (conditional - unconditional)
    best = guided.topk(min(top_k, guided.shape[-1]), dim=-1).indices
    return torch.full_like(conditional, float("-inf")).scatter(-1, best, conditional.gather(-1, best))


class DiaTarget(ColumnTarget):
    """DiaForConditionalGeneration. A prompt is one token, which stands for a column of begins of sentence; the text's
    encoding comes with `prefill`, of all streams, or beforehand in `text`."""

    texts = 1

    def __init__(self, model: PreTrainedModel, guidance: Guidance | None = None, hidden_layers: Sequence[int] = ()):
        super().__init__(model, guidance, hidden_layers)
        self.frame, self.codes = self.config.num_channels, self.config.vocab_size
        self.text: dict[str, Any] = {}

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, **rest: Any) -> Output | None:
        self.cross = DynamicCache()
        self.paired: EncoderDecoderCache | None = None
        return super().prefill(tokens, mask, **{**self.text, **rest})

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        if self.paired is None:
            assert self.cache is not None
            self.paired = EncoderDecoderCache(self.cache, self.cross)
        # at full size, as for an attention that is not its own transformers makes no mask, not even of the text's padding
        visible = self.extra["attention_mask"].bool()[:, None].expand(-1, tokens.shape[1], -1)
        out = self.model.model(
            encoder_outputs=self.extra["encoder_outputs"],
            attention_mask=self.finish_mask(visible),
            decoder_input_ids=torch.where(tokens[..., :1] < self.codes, tokens, self.config.bos_token_id),
            decoder_position_ids=positions,
            decoder_attention_mask=mask,
            past_key_values=self.paired,
            use_cache=True,
        )
        return out.last_hidden_state, None

    def heads(self, states: Tensor) -> Tensor:
        logits = self.model.logits_dense(states).unflatten(-1, (self.frame, self.codes))
        if self.guidance is None:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        return self.guidance.combine(conditional, unconditional, self.guidance.scale)


class Channels(LogitsProcessor):
    """What the delays d leave open in column j of channel c, both from 0. `start [B, L, C]`: what the first columns hold
    (the pad token: nothing yet); `last`: the last column in which the first channel may go on.

    Only the first channel ends by itself, in column s, and does so if the end is its likeliest code, else not; channel c
    says the end in column s + d_c and is padded from there on.
    """

    def __init__(self, config: Any, start: Tensor, last: int):
        decoder = config.decoder_config
        self.eos, self.pad = decoder.eos_token_id, decoder.pad_token_id
        self.delays = torch.tensor(config.delay_pattern, device=start.device)
        self.start, self.last = start, last

    def over_drafts(self, scores: Tensor, sequences: Sequences, drafts: Tensor, tree: Any, first: int) -> Tensor:
        said, index = said_with(sequences, drafts, first, scores.shape[1])
        frame = len(self.delays)
        column, channel = index // frame, index % frame
        code = torch.arange(scores.shape[2], device=scores.device)
        leading = (channel == 0)[..., None]
        scores = scores.masked_fill((code > self.eos) | (~leading & (code == self.eos)), float("-inf"))
        ending = (scores.argmax(-1) == self.eos)[..., None]
        scores = scores.masked_fill(ending ^ (code == self.eos), float("-inf"))
        ends = (said == self.eos)[:, ::frame]  # of the first channel
        end = torch.where(ends.any(1), ends.int().argmax(1), self.last).clamp(max=self.last)[:, None]
        delay = self.delays[channel]
        # a drafted end of the first channel does not make itself right: that is for the model to say
        due = (column == end + delay) & ((delay > 0) | (end == self.last))
        forced = torch.where(due, self.eos, torch.where(column > end + delay, self.pad, -1))
        row = torch.arange(len(said), device=said.device)[:, None]
        begun = self.start[row, column.clamp(max=self.start.shape[1] - 1), channel]
        held = (column < self.start.shape[1]) & (begun != self.pad)
        return force(scores, torch.where(held, begun, forced))


class DiaSpeech(FramedSpeech):
    """Reads a text as speaker 1, with the checkpoint's guidance scale (`model.generation_config.guidance_scale`)."""

    loads = "DiaForConditionalGeneration"
    speaks = DiaTarget
    prompt = "[S1] {text}"
    target: DiaTarget

    def __init__(self, model: PreTrainedModel, processor: Any):
        super().__init__(model, processor)
        config = self.model.config
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        numbers = {name: getattr(config.decoder_config, name) for name in tokens}
        self.reading = {**numbers, "delay_pattern": config.delay_pattern}
        self.sample_rate = processor.audio_tokenizer.config.sampling_rate

    @torch.no_grad()
    def encode(self, found: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        inputs = self.inputs(found)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        prompt = ids.new_full((len(ids), 1), self.target.codes)
        scale = getattr(self.model.generation_config, "guidance_scale", None) or 1.0
        self.target.guidance = None
        if scale != 1:
            self.target.guidance = Guidance(scale, prompt, combine=guide)
            ids, mask = torch.cat([ids, torch.zeros_like(ids)]), mask.repeat(2, 1)
        encoded = self.model.get_encoder()(ids, attention_mask=mask)
        self.target.text = {"encoder_outputs": encoded, "attention_mask": mask}
        self.start = inputs["decoder_input_ids"][:, 1:].long()
        self.limit = self.room(inputs)
        return prompt, torch.ones_like(prompt), self.limit * self.target.frame

    def room(self, inputs: Any) -> int:
        reads, config = inputs["input_ids"].shape[1], self.model.config
        if reads > config.encoder_config.max_position_embeddings:
            raise InputError(f"a text of {reads} bytes is too long for this model; give a shorter one")
        return min(config.decoder_config.max_position_embeddings - 1, self.most)

    def processors(self, knobs: Mapping[str, Any]) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
        if (guidance := self.target.guidance) is not None:
            combine = partial(guide, top_k=knobs["top_k"] or TOP_K)
            self.target.guidance = Guidance(guidance.scale, guidance.tokens, guidance.mask, combine)
        config = self.model.config
        return [Channels(config, self.start, self.limit - max(config.delay_pattern) - 1)], []

    def ends(self, frame: Tensor) -> bool:
        delays = self.model.config.delay_pattern
        return int(frame[delays.index(max(delays))]) == self.model.config.decoder_config.eos_token_id

    def own(self, inputs: Any, frames: int, knobs: dict[str, Any]) -> Tensor:
        return super().own(inputs, frames, knobs)[:, 1:]

    def wave(self, frames: Tensor) -> Tensor:
        begin = torch.full_like(frames[:1], self.reading["bos_token_id"])
        codes = torch.cat([begin, frames])[None]
        if int((frames[:, 0] < self.reading["eos_token_id"]).sum()) == 0:
            return torch.zeros(0)
        names = ("bos_token_id", "pad_token_id", "delay_pattern")
        return self.processor.batch_decode(codes, **{n: self.reading[n] for n in names})[0].flatten()
