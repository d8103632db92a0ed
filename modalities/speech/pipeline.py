"""Text to speech."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torchaudio
from torch import Tensor

from polyspec import pipelines
from polyspec.api import decode, make_draws
from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Processing
from polyspec.errors import ConfigError, InputError
from polyspec.metrics import DecodingStats
from polyspec.modalities.speech.sample import NAME, existing_sample, sample_path
from polyspec.modalities.speech.target import SpeechModel, load_model, make_speech_model
from polyspec.outputs import Audio, Result
from polyspec.recipe import find_recipe

PLAIN, WITH_HEADS = "autoregressive", "ddtree"
RATES = (8_000, 192_000)


class Pipeline:
    """Reads text aloud. See `polyspec.pipeline` for the arguments.

    target: a folder as `task=train modality=speech` writes it, a CSM, Dia or Higgs Audio v2 checkpoint, or a tuple of loaded
    parts: (model, tokenizer, codec) of the first kind, (model, processor) of the others, or (model, tokenizer, codec,
    CodecFormat) for a decoder-only model with a codec of transformers.
    """

    def __init__(
        self,
        *,
        target: Any = None,
        recipe: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        sample = NAME if pipelines.is_from(target, sample_path()) else None
        drafts = sample and pipelines.shipped_drafter(sample, find_recipe(WITH_HEADS), "heads")
        self.method = pipelines.choose("speech", recipe, WITH_HEADS if drafts else PLAIN, overrides, sample)
        if isinstance(target, tuple):
            self.speech: SpeechModel = make_speech_model(target)
        else:
            device = device or pipelines.default_device()
            source = existing_sample() if target is None else target
            self.speech = load_model(source, pipelines.as_dtype(dtype, device), device)
        self.model = self.speech.model

    @property
    def sample_rate(self) -> int:
        """Of the sound, in Hz, unless a call asks for another."""
        return self.speech.sample_rate

    @property
    def loaded(self) -> tuple[Any, ...]:
        """What another pipeline takes as `target`, to share it."""
        return self.speech.parts

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        sample_rate: int | None = None,
        seed: int | Sequence[int] | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Result:
        """Speak each text; `outputs` holds one Audio a text. Long texts are split at sentences, which are spoken side by
        side and joined.

        sample_rate: in Hz, by default the codec's own. Sampling knobs left out are the checkpoint's. progress: called with
        the number of new token positions. The stats have the seconds of audio, and the real-time factor.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_rate(sample_rate)
        found = [self.speech.pieces(text) for text in check_texts(texts)]
        knobs = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        seeds = piece_seeds(seed, [len(f) for f in found])
        emit = None if progress is None else lambda _: progress(1)
        spoken, stats = self.tokens([p for f in found for p in f], seeds, emit, **knobs)
        start = time.perf_counter()
        waves = [self.speech.voice().push(tokens, last=True) for tokens in spoken]
        outputs, done = [], 0
        for parts in found:
            wave = torch.cat(waves[done : done + len(parts)]).clamp(-1, 1)[None]
            done += len(parts)
            outputs.append(Audio(*resampled(wave, self.speech.sample_rate, sample_rate)))
        stats.wall_seconds += time.perf_counter() - start
        stats.audio_seconds = sum(len(w) for w in waves) / self.speech.sample_rate
        stats.first_output_seconds = stats.wall_seconds
        return Result(outputs, stats)

    def stream(self, text: str, *, seed: int | None = None, **knobs: Any) -> SpeechStream:
        """Speak `text` while it is being decoded: an iterator over Audio chunks, which joined are what `__call__` gives, at
        the codec's sample rate. knobs: do_sample, temperature, top_k, top_p."""
        found = self.speech.pieces(check_texts([text])[0])
        self.sampling(**knobs)  # bad ones are refused now
        return SpeechStream(self, found, piece_seeds(seed, [len(found)]), knobs)

    def tokens(
        self, found: Sequence[str], seeds: Sequence[int] | None, emit: Callable[[Tensor], None] | None, **knobs: Any
    ) -> tuple[list[list[int]], DecodingStats]:
        """New tokens of each piece, in one batch."""
        ids, mask, limit = self.speech.encode(found)
        sampling, shaped = self.sampling(**knobs)
        stops = self.speech.stops(ids.shape[1])
        sequences = Sequences(ids, limit, mask=mask, eos=self.speech.eos, stops=stops, emit=emit)
        before, behind = self.speech.processors(self.settings(**knobs))
        processing = Processing([*before, *shaped, *behind], self.speech.constraint(limit))
        draws = make_draws(self.method, sampling, seeds, len(ids), ids.device)
        stats = decode(self.method, self.speech.target, sequences, processing, draws, {})
        return [sequences.history[row][-(n - ids.shape[1]) :] for row, n in enumerate(sequences.lengths)], stats

    def sampling(self, **given: Any) -> tuple[bool, list[Any]]:
        """Whether to sample, and the processors of the knobs: what the caller gave, or else the checkpoint's."""
        chosen = self.settings(**given)
        sampling = bool(chosen.pop("do_sample"))
        shaped = pipelines.processors(**chosen)
        return sampling, shaped if sampling else []

    def settings(self, **given: Any) -> dict[str, Any]:
        """The sampling knobs by name: what the caller gave, or else the checkpoint's."""
        config = self.model.generation_config
        names = ("do_sample", "temperature", "top_k", "top_p")
        if unused := [name for name in given if name not in names]:
            raise ConfigError(f"{unused[0]} does not apply to speech; choose among {', '.join(names)}")
        return {n: getattr(config, n, None) if given.get(n) is None else given[n] for n in names}


class SpeechStream:
    """Audio chunks of one text as they are decoded; `stats` once it has ended. Closing it stops the decoding."""

    def __init__(self, pipe: Pipeline, found: Sequence[str], seeds: list[int] | None, knobs: Mapping[str, Any]):
        self.pipe, self.found, self.seeds, self.knobs = pipe, found, seeds, knobs
        self.stats: DecodingStats | None = None
        self.chunks = self.run()

    def __iter__(self) -> Iterator[Audio]:
        return self.chunks

    def __next__(self) -> Audio:
        return next(self.chunks)

    def close(self) -> None:
        """Stop decoding."""
        self.chunks.close()  # type: ignore[attr-defined]

    def run(self) -> Iterator[Audio]:
        start, first, samples = time.perf_counter(), 0.0, 0
        for number, piece in enumerate(self.found):
            for wave in self.piece(piece, None if self.seeds is None else self.seeds[number : number + 1]):
                first = first or time.perf_counter() - start
                samples += len(wave)
                yield Audio(wave.clamp(-1, 1)[None], self.pipe.speech.sample_rate)
        assert self.stats is not None
        self.stats.wall_seconds = time.perf_counter() - start
        self.stats.audio_seconds = samples / self.pipe.speech.sample_rate
        self.stats.first_output_seconds = first

    def piece(self, piece: str, seeds: list[int] | None) -> Iterator[Tensor]:
        """Chunks of one piece. The loop runs in a thread and hands tokens over."""
        waiting: queue.Queue[Any] = queue.Queue()
        closed = threading.Event()

        def emit(token: Tensor) -> None:
            if closed.is_set():
                raise StopSpeaking
            waiting.put(int(token))

        def work() -> None:
            try:
                waiting.put(self.pipe.tokens([piece], seeds, emit, **self.knobs)[1])
            except BaseException as error:
                waiting.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        voice = self.pipe.speech.voice()
        try:
            while isinstance(found := waiting.get(), int):
                if len(wave := voice.push([found])):
                    yield wave
            if isinstance(found, BaseException):
                raise found
            self.stats = found if self.stats is None else self.stats.plus(found)
            if len(wave := voice.push([], last=True)):
                yield wave
        finally:
            closed.set()
            thread.join()


class StopSpeaking(Exception):
    """Nobody listens any more."""


def check_texts(texts: Sequence[Any]) -> list[str]:
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError("the text is empty; say what to speak")
    return list(texts)


def check_rate(rate: Any) -> None:
    low, high = RATES
    if rate is not None and not (isinstance(rate, int) and low <= rate <= high):
        raise ConfigError(f"sample_rate must be a whole number of Hz from {low} to {high}, got {rate!r}")


def resampled(wave: Tensor, own: int, wanted: int | None) -> tuple[Tensor, int]:
    """`wave [C, T]` at the wanted rate, and the rate."""
    if wanted is None or wanted == own:
        return wave, own
    return torchaudio.functional.resample(wave, own, wanted), wanted


def piece_seeds(seed: int | Sequence[int] | None, counts: Sequence[int]) -> list[int] | None:
    """A seed for each of `counts[i]` pieces of each text: the first has the text's own, as in a batch of whole texts."""
    if seed is None:
        return None
    whole = isinstance(seed, int) or (isinstance(seed, Sequence) and all(isinstance(s, int) for s in seed))
    if not whole:
        raise ConfigError(f"seed must be a 64-bit whole number, a list of one a text, or None; got {seed!r}")
    seeds = [seed + i for i in range(len(counts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(counts):
        raise ConfigError(f"seed has {len(seeds)} entries for {len(counts)} texts; give one a text or a single int")
    return [s + 1_000_003 * piece for s, n in zip(seeds, counts, strict=True) for piece in range(n)]
