"""Text-to-speech models behind one seam: what the pipeline asks of any of them.

A `SpeechModel` says how text becomes token ids, what may follow them, when it ends, and how tokens become sound; decoding is
the loops' own matter. Models of the sample's kind speak phonemes and codes by turns (`InterleavedSpeech`), ordinary
decoder-only models with a codec of transformers speak frames of codes (`CodecSpeech`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LogitsProcessor, PreTrainedModel

from polyspec import pipelines
from polyspec.distributions import Constraint
from polyspec.errors import CheckpointError, ConfigError, InputError
from polyspec.modalities.speech.codec import Speaker, SpeechCodec
from polyspec.modalities.speech.csm import CsmSpeech
from polyspec.modalities.speech.dia import DiaSpeech
from polyspec.modalities.speech.frames import FramedSpeech, WholeVoice, until
from polyspec.modalities.speech.higgs import HiggsSpeech
from polyspec.modalities.speech.phonemes import Interleaved, Layout, pieces
from polyspec.target import Output, Target
from polyspec.verification import TokenGroups

_GROUPS: weakref.WeakKeyDictionary[PreTrainedModel, dict[float, TokenGroups]] = weakref.WeakKeyDictionary()


class SpeechTarget(Target):
    """A decoder-only target among whose tokens are codes, ids `first_code` … `first_code + codes - 1`."""

    first_code = 0
    codes = 0

    def token_groups(self, mean_size: float) -> TokenGroups:
        """Acoustic groups of the codes, `mean_size` of them in the mean, by the likeness of their embeddings; every other
        token, the end of speech say, is alone."""
        known = _GROUPS.setdefault(self.model, {})
        if mean_size not in known:
            layer: Any = self.model.get_input_embeddings()
            table = layer.weight.detach()[: self.vocab_size]
            among = range(self.first_code, self.first_code + self.codes)
            known[mean_size] = TokenGroups.of_mean_size(
                table, mean_size, [t for t in range(len(table)) if t not in among]
            )
        return known[mean_size]


class BarkTarget(Target):
    """Bark's semantic and coarse stages inside transformers' `generate`: more tokens go in than come out, and the semantic
    stage's prompt is given as embeddings (of the text plus those of what was said before)."""

    takes_embeds = True
    """For `polyspec.custom_generate`: prompts may come as `inputs_embeds`."""

    prompt_embeds: Tensor | None = None

    @property
    def vocab_size(self) -> int:
        return self.config.output_vocab_size

    def prefill(
        self, tokens: Tensor, mask: Tensor | None = None, *, inputs_embeds: Tensor | None = None, **rest: Any
    ) -> Output | None:
        if inputs_embeds is not None and mask is not None and not bool(mask.all()):
            raise InputError("prompts as inputs_embeds cannot be padded; leave the attention mask out")
        self.prompt_embeds = inputs_embeds
        return super().prefill(tokens, mask, **rest)

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        embeds = self.model.get_input_embeddings()(tokens)
        if self.prompt_embeds is not None:
            prompt = self.present(self.prompt_embeds).to(embeds.dtype)
            width = prompt.shape[1]
            index = positions.expand(tokens.shape).clamp(max=width - 1)[..., None].expand(-1, -1, prompt.shape[-1])
            embeds = torch.where((positions < width)[..., None], prompt.gather(1, index), embeds)
        out = self.model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(self.hidden_layers),
        )
        return out.logits if keep_logits else None, out.hidden_states


FRAMED: dict[str, type[FramedSpeech]] = {"csm": CsmSpeech, "dia": DiaSpeech, "higgs_audio_v2": HiggsSpeech}
"""Models that say several codes a step, by model type."""

TARGETS = {
    "semantic": BarkTarget,
    "coarse_acoustics": BarkTarget,
    **{kind: speech.speaks for kind, speech in FRAMED.items()},
}


class Voice(Protocol):
    """One utterance's tokens to sound."""

    def push(self, tokens: Sequence[int], last: bool = False) -> Tensor:
        """Samples `[T]` that can be given once the next `tokens` are known, none at times; `last`: no more will come."""
        ...


class SpeechModel(Protocol):
    """What the pipeline asks of a text-to-speech model."""

    model: Any
    parts: tuple[Any, ...]
    """What it was made of: what another pipeline takes as `target`, to share it."""
    sample_rate: int
    eos: Tensor | None
    """The tokens that end speech."""

    @property
    def target(self) -> Target: ...

    def pieces(self, text: str) -> list[str]:
        """What is spoken at once each, in order. InputError if nothing of the text can be spoken."""
        ...

    def encode(self, found: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """Pieces as ids `[B, P]` and mask `[B, P]`, padded on the left, and how many tokens may follow."""
        ...

    def processors(self, knobs: Mapping[str, Any]) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
        """What comes before the sampling knobs, and what behind, for one run with these `knobs`, behind `encode`."""
        ...

    def constraint(self, limit: int) -> Constraint | None:
        """What a position among `limit` may hold, where that does not depend on the others."""
        ...

    def stops(self, prompt: int) -> list[Callable[[Tensor, None], Tensor]]:
        """What else ends speech: asked about a row `[1, L]`, `prompt` of whose tokens are text, answers `[1]` bool."""
        ...

    def voice(self) -> Voice:
        """For one utterance."""
        ...

    def generate(self, found: Sequence[str], **knobs: Any) -> list[list[int]]:
        """New tokens of each piece as the model's own `generate` draws them, the end included, with its sampling knobs."""
        ...


class OneStream:
    """Base of the models that say one token a step, of which one ends speech: `generate` is transformers' plain one."""

    model: Any
    eos: Tensor | None

    def stops(self, prompt: int) -> list[Callable[[Tensor, None], Tensor]]:
        return []

    def generate(self: Any, found: Sequence[str], **knobs: Any) -> list[list[int]]:
        ids, mask, limit = self.encode(found)
        prompt, constraint, allowed = ids.shape[1], self.constraint(limit), {}
        if constraint is not None:
            sets, kinds = [s.nonzero()[:, 0].tolist() for s in constraint.sets], constraint.kinds.tolist()
            allowed = {"prefix_allowed_tokens_fn": lambda row, seen: sets[kinds[min(len(seen) - prompt, len(kinds) - 1)]]}
        own, _ = self.processors(knobs)
        sampling = bool(knobs.pop("do_sample", False))
        end = int(self.eos)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=sampling,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            # here, for a model's own processors come before the knobs
            logits_processor=[*own, *(pipelines.processors(**knobs) if sampling else [])],
            eos_token_id=end,
            pad_token_id=end,
            **allowed,
        )[:, prompt:]
        return [until(row, lambda token: token == end) for row in out.tolist()]


class InterleavedSpeech(OneStream):
    """The sample's kind: see `polyspec.modalities.speech.phonemes`. Raises CheckpointError for parts that do not fit."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, codec: SpeechCodec):
        self.layout = Layout.of(tokenizer)
        sizes = (model.config.vocab_size, self.layout.codes, self.layout.phonemes)
        theirs = (self.layout.size, codec.config.codes, codec.config.phonemes)
        if sizes != theirs:
            raise CheckpointError(
                "model, tokenizer and codec do not belong together: the model has {} tokens, of which the tokenizer takes {} "
                "for codes and {} for phonemes; expected are {}, {} and {}".format(*sizes, *theirs)
            )
        self.model, self.tokenizer, self.codec = model, tokenizer, codec
        self.parts = (model, tokenizer, codec)
        self.form = Interleaved(self.layout)
        self.target = SpeechTarget(model)
        self.target.codes = self.layout.codes
        self.sample_rate = codec.config.sample_rate
        self.eos: Tensor | None = torch.tensor([self.layout.end], device=model.device)
        self.known = {t for t, i in tokenizer.get_vocab().items() if 0 < i - self.layout.first_phoneme < self.layout.phonemes}

    def pieces(self, text: str) -> list[str]:
        return pieces(text, self.known)

    def encode(self, found: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        inputs = self.tokenizer(list(found), padding=True, return_tensors="pt").to(self.model.device)
        longest = inputs["input_ids"].shape[1]
        room = self.model.config.max_position_embeddings - longest
        return inputs["input_ids"], inputs["attention_mask"], min(self.form.most(longest), room)

    def processors(self, knobs: Mapping[str, Any]) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
        return [self.form], []

    def constraint(self, limit: int) -> Constraint | None:
        return None

    def voice(self) -> Voice:
        return InterleavedVoice(self.layout, Speaker(self.codec))


class InterleavedVoice:
    """Takes phonemes and codes apart."""

    def __init__(self, layout: Layout, speaker: Speaker):
        self.layout, self.speaker, self.phoneme = layout, speaker, 0

    def push(self, tokens: Sequence[int], last: bool = False) -> Tensor:
        codes, phonemes = [], []
        for token in tokens:
            if token >= self.layout.first_spoken:
                self.phoneme = (token - self.layout.first_spoken) // self.layout.durations
            elif token < self.layout.codes:
                codes.append(token)
                phonemes.append(self.phoneme)
        return self.speaker.push(codes, phonemes, last)


@dataclass(frozen=True, slots=True)
class CodecFormat:
    """How a decoder-only model writes speech: frames of `codebooks` codes, code c of codebook k being the token
    first_code + k · codes + c; behind `prompt`, with the text put in for {text}; until the token `end`."""

    first_code: int
    codes: int
    codebooks: int
    end: int
    prompt: str = "{text}"
    frames: int = 1500


class CodecSpeech(OneStream):
    """An ordinary decoder-only transformers model and a codec of transformers (`decode(audio_codes [B, K, T])`: Mimi, DAC,
    EnCodec, …). Raises CheckpointError where the model has no room for the codec's codes."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, codec: Any, form: CodecFormat):
        last = form.first_code + form.codebooks * form.codes
        size = model.config.get_text_config(decoder=True).vocab_size
        theirs = codec.config.codebook_size
        if last > size or form.end >= size or form.codes != theirs:
            raise CheckpointError(
                f"the codes take the ids {form.first_code} … {last - 1}, {form.codes} a codebook, and {form.end} is the end; "
                f"the model has {size} tokens and the codec {theirs} codes a codebook: give the CodecFormat of this model"
            )
        self.model, self.tokenizer, self.codec, self.form = model, tokenizer, codec, form
        self.parts = (model, tokenizer, codec, form)
        self.target = SpeechTarget(model)
        self.target.first_code, self.target.codes = form.first_code, form.codebooks * form.codes
        self.sample_rate = codec.config.sampling_rate
        self.eos: Tensor | None = torch.tensor([form.end], device=model.device)

    def pieces(self, text: str) -> list[str]:
        return [text]

    def encode(self, found: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        texts = [self.form.prompt.format(text=text) for text in found]
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        inputs = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(self.model.device)
        ids, limit = inputs["input_ids"], self.form.frames * self.form.codebooks + 1
        room = self.model.config.get_text_config(decoder=True).max_position_embeddings - ids.shape[1]
        if room <= self.form.codebooks:
            raise InputError(f"a text of {ids.shape[1]} tokens leaves no room for speech; give a shorter one")
        return ids, inputs["attention_mask"], min(limit, room)

    def processors(self, knobs: Mapping[str, Any]) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
        return [], []

    def constraint(self, limit: int) -> Constraint:
        """The codebooks in turn; the end only between frames."""
        form, size = self.form, self.target.vocab_size
        sets = torch.zeros(form.codebooks, size, dtype=torch.bool, device=self.model.device)
        for k in range(form.codebooks):
            begin = form.first_code + k * form.codes
            sets[k, begin : begin + form.codes] = True
        sets[0, form.end] = True
        return Constraint(sets, torch.arange(max(limit, 1), device=self.model.device) % form.codebooks)

    def voice(self) -> Voice:
        return WholeVoice(self.form.codebooks, self.wave)

    def wave(self, frames: Tensor) -> Tensor:
        """Frames `[T, K]` of tokens to samples."""
        codes = (frames - self.form.first_code).T[None].to(self.codec.device) % self.form.codes
        return self.codec.decode(audio_codes=codes).audio_values.flatten()


def load_model(source: Any, dtype: torch.dtype, device: Any) -> SpeechModel:
    """A model of the sample's kind from a folder, or one of `FRAMED` from a folder or the hub; CheckpointError if it is
    none."""
    from transformers import AutoModelForCausalLM

    kind = pipelines.load(AutoConfig.from_pretrained, source).model_type
    if kind in FRAMED:
        loader = getattr(transformers, FRAMED[kind].loads).from_pretrained
        model = pipelines.load(loader, source, dtype=dtype).to(device).eval()
        return FRAMED[kind](model, pipelines.load(AutoProcessor.from_pretrained, source))
    if not Path(source).is_dir() or not (Path(source) / "codec").is_dir():
        raise CheckpointError(
            f"{source} is not a folder with a speech model and its codec/, as polyspec task=train modality=speech writes it; "
            f"for other models hand (model, tokenizer, codec, CodecFormat) over as target, or name a {' or '.join(FRAMED)} "
            "checkpoint"
        )
    model = pipelines.load(AutoModelForCausalLM.from_pretrained, source, dtype=dtype).to(device).eval()
    tokenizer = pipelines.load(AutoTokenizer.from_pretrained, source, padding_side="left")
    codec = pipelines.load(SpeechCodec.from_pretrained, Path(source) / "codec", dtype=torch.float32).to(device).eval()
    return InterleavedSpeech(model, tokenizer, codec)


def make_speech_model(loaded: tuple[Any, ...]) -> SpeechModel:
    """What a tuple of loaded parts is; ConfigError for anything else."""
    if len(loaded) == 4:
        return CodecSpeech(*loaded)
    if len(loaded) == 3:
        return InterleavedSpeech(*loaded)
    kind = getattr(getattr(loaded[0], "config", None), "model_type", type(loaded[0]).__name__) if loaded else "nothing"
    if len(loaded) == 2 and kind in FRAMED:
        return FRAMED[kind](*loaded)
    raise ConfigError(
        f"target must be a folder, (model, tokenizer, codec) of the sample's kind, (model, tokenizer, codec, CodecFormat), or "
        f"(model, processor) of type {' or '.join(FRAMED)}; got {len(loaded)} parts, the first {kind}"
    )
