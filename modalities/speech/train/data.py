"""What the speech sample learns from: sentences, spoken by hibari-tts, which also says when each phoneme ends.

Two folders of shards, both continued where an interrupted run stopped: `audio`, waveforms of some of the sentences, for the
codec and the vocoder; `codes`, phonemes and codes of all of them, for what predicts codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from polyspec.errors import ConfigError, InputError
from polyspec.modalities.speech.codec import SpeechCodec
from polyspec.modalities.speech.phonemes import DURATIONS, EDGE, LONGEST, alphabet, phonemiser
from polyspec.training.data import check_settings, read_shards, save_shard

SHARD = 250  # sentences
STEP = 600  # samples in the 25 ms that the voice counts durations in


@dataclass(frozen=True, slots=True)
class DataConfig:
    """path: English sentences, one a line. audio: how many of them are kept as waveforms; sentences: how many are learnt
    from in all (None: as many as there are); held_out: how many at the end of the file are left for measuring."""

    path: str
    audio: int = 4000
    sentences: int | None = None
    held_out: int = 500
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Spoken:
    """A sentence: ids of its phonemes (0 at the edges) and the codes' worth of time each takes `[P]`; samples `[T]` in
    [-1, 1], T = 600 · Σ durations; the pitch of each frame of 300 samples `[T / 300]` in Hz, 0 where there is none."""

    phonemes: np.ndarray
    durations: np.ndarray
    samples: np.ndarray
    pitch: np.ndarray


class Voice:
    """hibari-tts with its phoneme durations as an output beside the spectrum."""

    def __init__(self) -> None:
        import hibari.dsp
        import onnx
        import onnxruntime

        self.tts, self.dsp = phonemiser(), hibari.dsp
        graph = onnx.load(self.tts.model_path)
        ends = [node.output[0] for node in graph.graph.node if node.op_type == "CumSum"]
        if len(ends) != 1:
            raise ConfigError(
                "this version of hibari-tts does not say how long phonemes last; install hibari-tts==0.2.1"
            )
        graph.graph.output.append(onnx.ValueInfoProto(name=ends[0]))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
        self.number = {c: i + 1 for i, c in enumerate(alphabet())}

    def speak(self, text: str, seed: int) -> Spoken | None:
        """The sentence, None if it is not one or too long."""
        found = self.tts.phonemize(text)
        if len(found) != 1 or not 3 <= len(found[0]) <= LONGEST:
            return None
        kept = [c for c in found[0] if c in self.tts.vocab]
        inputs = {"ids": np.asarray([self.tts.ids(kept)], np.int64), "speed": np.ones(1, np.float32)}
        outputs: Any = self.session.run(None, inputs)
        *spectrum, ends = outputs
        samples = self.dsp.synth(*(part[0] for part in spectrum), np.random.default_rng(seed))
        ends = np.asarray(ends).reshape(-1)
        durations = np.diff(ends, prepend=0)
        if len(samples) != STEP * ends[-1] or not 1 <= durations.min() <= durations.max() <= DURATIONS:
            return None
        pitch = spectrum[-1][0]
        phonemes = np.array([0, *(self.number[c] for c in kept), 0])
        return Spoken(phonemes, durations, samples, np.where(pitch > 40, pitch, 0))


def read_sentences(data: DataConfig) -> tuple[list[str], list[str]]:
    """(Sentences to learn from, sentences held out). InputError if the file cannot be read or has too few."""
    try:
        lines = Path(data.path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read sentences from {data.path} ({error}); give a text file with one a line"
        ) from error
    lines = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(lines) <= data.held_out:
        raise InputError(f"{data.path} has {len(lines)} sentences; give more than held_out={data.held_out}")
    cut = len(lines) - data.held_out
    return lines[:cut][: data.sentences], lines[cut:]


def make_audio(data: DataConfig, folder: Path) -> list[dict[str, np.ndarray]]:
    """Waveforms of the first `data.audio` sentences: shards with `samples` int16, `pitch` float16, `lengths` in codes."""
    sentences = read_sentences(data)[0][: data.audio]
    voice = Voice()

    def shard(first: int) -> dict[str, np.ndarray]:
        spoken = list(speak_all(voice, sentences, first, data.seed))
        return {
            "samples": np.concatenate([np.rint(s.samples.clip(-1, 1) * 32767).astype(np.int16) for s in spoken]),
            "pitch": np.concatenate([s.pitch.astype(np.float16) for s in spoken]),
            "lengths": np.array([s.durations.sum() for s in spoken]),
        }

    return grow(folder, {"data": asdict(data)}, len(sentences), shard, "speaking")


def make_codes(data: DataConfig, codec: SpeechCodec, mark: str, folder: Path) -> list[dict[str, np.ndarray]]:
    """Phonemes and codes of all sentences: shards with `phonemes`, `durations` (a number a phoneme), `codes [2, T]` and how
    many phonemes and codes each sentence has, `lengths [N, 2]`. mark: tells one codec from another."""
    sentences = read_sentences(data)[0]
    voice = Voice()

    def shard(first: int) -> dict[str, np.ndarray]:
        spoken = list(speak_all(voice, sentences, first, data.seed))
        codes = [codec.encode(torch.from_numpy(s.samples)[None])[0].numpy().astype(np.int16) for s in spoken]
        return {
            "phonemes": np.concatenate([s.phonemes.astype(np.int16) for s in spoken]),
            "durations": np.concatenate([s.durations.astype(np.int16) for s in spoken]),
            "codes": np.concatenate(codes, axis=1),
            "lengths": np.array([[len(s.phonemes), s.durations.sum()] for s in spoken]),
        }

    return grow(folder, {"data": asdict(data), "codec": mark}, len(sentences), shard, "encoding")


def speak_all(voice: Voice, sentences: list[str], first: int, seed: int) -> Iterator[Spoken]:
    """A shard's sentences from `first` on, those left out that cannot be used."""
    for number, text in enumerate(sentences[first : first + SHARD], first):
        if (spoken := voice.speak(text, seed + number)) is not None:
            yield spoken


def grow(
    folder: Path, settings: Mapping[str, Any], count: int, shard: Callable[[int], dict[str, np.ndarray]], label: str
) -> list[dict[str, np.ndarray]]:
    """The shards in `folder`, made where they lack, for `count` sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder / "settings.json", dict(settings))
    found = list(read_shards(folder))
    for index in tqdm(range(len(found), -(-count // SHARD)), desc=label, unit=" shards"):
        found.append(shard(index * SHARD))
        save_shard(folder, index, found[-1])
    return found


def phoneme_names() -> list[str]:
    """Names of the phoneme ids above: the edge, then the alphabet."""
    return [EDGE, *alphabet()]
