"""Higgs Audio v2: K codebooks in delayed columns, codebook k's stream k columns behind the first's.

Boson AI's model, a Llama whose layers have a second feed-forward block for audio. A column's codes are drawn at once, each
from its own K-th of the output layer; which of them must still be the begin-of-stream code, or already the end-of-stream
code, follows from the columns before. transformers' own processor counts that in a state which every call moves on; here
it is worked out from the columns themselves, for every drafted prefix, so there is nothing to be put back after a rejection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, PreTrainedModel

from polyspec.decoding.sequences import Sequences
from polyspec.errors import ConfigError
from polyspec.guidance import Guidance
from polyspec.modalities.speech.frames import ColumnTarget, FramedSpeech, force, said_with
from polyspec.target import Output


class HiggsTarget(ColumnTarget):
    """HiggsAudioV2ForConditionalGeneration."""

    def __init__(self, model: PreTrainedModel, guidance: Guidance | None = None, hidden_layers: Sequence[int] = ()):
        super().__init__(model, guidance, hidden_layers)
        config = self.model.config
        self.frame, self.codes, self.texts = config.num_codebooks, config.codebook_size, config.vocab_size

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, **rest: Any) -> Output | None:
        if self.guidance is not None:
            raise ConfigError("Higgs Audio speaks without guidance; leave guidance_scale out")
        return super().prefill(tokens, mask, **rest)

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        assert self.cache is not None
        columns = tokens if tokens.dim() == 3 else pad(tokens[..., None], (0, self.frame - 1))
        inputs: dict[str, Any] = {"audio_input_ids": columns.clamp(max=self.codes - 1)}
        # the layers take another branch for audio alone, as in the model's own generate
        if any(n < p for n, p in zip(self.cache.lengths, self.prompt_lengths, strict=True)):
            text = columns[..., 0] - self.codes
            inputs["input_ids"] = torch.where(text >= 0, text, self.model.config.audio_token_id)
            inputs["audio_input_ids_mask"] = text < 0
        out = self.model.model(
            **inputs, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
        )
        return out.last_hidden_state, None

    def heads(self, states: Tensor) -> Tensor:
        return self.model.audio_lm_head(states).unflatten(-1, (self.frame, self.codes))


class Delays(LogitsProcessor):
    """What the delays leave open. Column j, codebook k, both from 0; where a row's last K prompt tokens hold the
    begin-of-audio token, at place a, it is

        begin of stream while j ≤ k + 1 - (K - a),    a = K without such a token, and if no row has one column 0 alone;
        end of stream once j ≥ e + k + 1,    column e being the first with an end of stream in it.

    For one run: the prompt is looked at once.
    """

    def __init__(self, config: Any):
        self.frame, self.bos, self.eos = config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id
        self.audio_bos = config.audio_bos_token_id + config.codebook_size
        self.begins: Tensor | None = None
        self.raw: Tensor | None = None
        """The scores as they were given last, for `Repetitions`."""

    def until(self, sequences: Sequences) -> Tensor:
        """The last column of each codebook that must be the begin of stream `[B, K]`."""
        book = torch.arange(self.frame, device=sequences.device).expand(sequences.batch, -1)
        window = sequences.tokens[:, : sequences.prompt_length][:, -self.frame :] == self.audio_bos
        if not bool(window.any()):
            return torch.zeros_like(book)
        place = torch.where(window.any(1), window.int().argmax(1), self.frame)
        return book + 1 - (self.frame - place)[:, None]

    def over_drafts(self, scores: Tensor, sequences: Sequences, drafts: Tensor, tree: Any, first: int) -> Tensor:
        self.raw = scores
        if self.begins is None:
            self.begins = self.until(sequences)
        said, index = said_with(sequences, drafts, first, scores.shape[1])
        column, book = index // self.frame, index % self.frame
        ends = said == self.eos
        ended = torch.where(ends.any(1), ends.int().argmax(1) // self.frame, said.shape[1])[:, None]
        forced = torch.where(column <= self.begins.gather(1, book), self.bos, -1)
        return force(scores, torch.where(column >= ended + book + 1, self.eos, forced))


class Repetitions(LogitsProcessor):
    """Repetition-aware sampling (VALL-E 2, 2406.05370, as the model's own `generate` does it), behind all other
    processors: a code drawn from p that its codebook had `most` times or more in the last `window` columns, ends of stream
    not counted, is drawn again from the model's own r. So what is drawn has the distribution

        p'(v) = p(v)·[v not repeated] + r(v)·Σ_{u repeated} p(u).
    """

    def __init__(self, delays: Delays, window: int, most: int):
        self.delays, self.window, self.most = delays, window, most

    def over_drafts(self, scores: Tensor, sequences: Sequences, drafts: Tensor, tree: Any, first: int) -> Tensor:
        said, index = said_with(sequences, drafts, first, scores.shape[1])
        frame, raw = self.delays.frame, self.delays.raw
        assert raw is not None
        back = index[..., None] - frame * torch.arange(1, self.window + 1, device=index.device)
        before = said.gather(1, back.clamp(min=0).flatten(1)).view_as(back)
        counted = (back >= 0) & (before != self.delays.bos) & (before != self.delays.eos)
        times = torch.zeros_like(scores).scatter_add_(2, before.clamp(min=0), counted.to(scores.dtype))
        p, repeated = scores.softmax(-1), times >= self.most
        again = (p * repeated).sum(-1, keepdim=True)
        return (p.masked_fill(repeated, 0.0) + again * raw.float().softmax(-1)).log()


class HiggsSpeech(FramedSpeech):
    """Reads a text as the checkpoint's chat template has a user's message read."""

    loads = "HiggsAudioV2ForConditionalGeneration"
    speaks = HiggsTarget
    system = "Generate audio following instruction."
    """What the system is told to do."""

    def __init__(self, model: PreTrainedModel, processor: Any):
        super().__init__(model, processor)
        self.sample_rate = processor.audio_tokenizer.config.sample_rate

    def inputs(self, found: Sequence[str]) -> Any:
        def said(role: str, text: str) -> dict[str, Any]:
            return {"role": role, "content": [{"type": "text", "text": text}]}

        conversations = [[said("system", self.system), said("user", text)] for text in found]
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        ).to(self.model.device)

    def processors(self, knobs: Mapping[str, Any]) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
        config, delays = self.model.generation_config, Delays(self.model.config)
        window, most = (getattr(config, name, None) for name in ("ras_win_len", "ras_win_max_num_repeat"))
        if not knobs["do_sample"] or window is None or most is None:
            return [delays], []
        return [delays], [Repetitions(delays, window, most)]

    def ends(self, frame: Tensor) -> bool:
        return bool((frame == self.model.config.audio_stream_eos_id).all())

    def wave(self, frames: Tensor) -> Tensor:
        # what the processor turns into sound: at least one frame between a column of begins and one of ends
        begins = (frames == self.model.config.audio_stream_bos_id).all(1)
        if not bool(begins.any()) or len(frames) - int(begins.nonzero()[-1]) < self.target.frame + 2:
            return torch.zeros(0)
        return self.processor.batch_decode(frames[None])[0].flatten()
