"""How well a recogniser understands what recipes say, and how it would be rated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchaudio
from torch import Tensor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from polyspec import pipelines
from polyspec.modalities.speech.evaluate import bench_prompts, word_error_rate
from polyspec.outputs import Audio


class Recogniser:
    """A speech recogniser of transformers, Whisper say: a folder or hub id. CheckpointError if it cannot be loaded."""

    def __init__(self, source: str, device: Any = "cpu"):
        self.model = pipelines.load(AutoModelForSpeechSeq2Seq.from_pretrained, source).to(device).eval()
        self.processor = pipelines.load(AutoProcessor.from_pretrained, source)

    @torch.no_grad()
    def __call__(self, sounds: Sequence[Audio]) -> list[str]:
        """What is heard in each."""
        rate = self.processor.feature_extractor.sampling_rate
        waves = [torchaudio.functional.resample(a.waveform.mean(0), a.sample_rate, rate).numpy() for a in sounds]
        inputs = self.processor(waves, sampling_rate=rate, return_tensors="pt").to(self.model.device, self.model.dtype)
        return self.processor.batch_decode(self.model.generate(**inputs), skip_special_tokens=True)


MOS_RATE = VOICE_RATE = 16_000


def dnsmos(sounds: Sequence[Audio]) -> float | None:
    """The mean overall rating, 1 to 5, that listeners would give, as DNSMOS P.835 predicts it (2110.01763). It comes from
    the package speechmos (extra `quality`); None without it."""
    try:
        from speechmos import dnsmos as model  # type: ignore[import-not-found]
    except ImportError:
        return None
    rated = []
    for sound in sounds:
        wave = torchaudio.functional.resample(sound.waveform.mean(0), sound.sample_rate, MOS_RATE).clamp(-1, 1)
        rated.append(float(model.run(wave.numpy(), MOS_RATE)["ovrl_mos"]))
    return sum(rated) / max(1, len(rated))


def speaker_similarity(sounds: Sequence[Audio], others: Sequence[Audio]) -> float | None:
    """The mean cosine between the voices of `sounds` and of `others`, pair by pair, as the speaker encoder of the package
    resemblyzer hears them (GE2E, 1710.10467); None without it."""
    try:
        from resemblyzer import VoiceEncoder  # type: ignore[import-not-found]
    except ImportError:
        return None
    encoder = VoiceEncoder("cpu", verbose=False)

    def voice(sound: Audio) -> Tensor:
        wave = torchaudio.functional.resample(sound.waveform.mean(0).float(), sound.sample_rate, VOICE_RATE)
        return torch.from_numpy(encoder.embed_utterance(wave.numpy()))

    pairs = [(voice(a), voice(b)) for a, b in zip(sounds, others, strict=True)]
    return float(sum(torch.cosine_similarity(a, b, dim=0) for a, b in pairs)) / max(1, len(pairs))


def bench_quality(
    pipes: Mapping[str, Any], settings: Mapping[str, Any], arguments: Mapping[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """For each pipeline, by label: `word_error_rate` of what the recogniser hears, `dnsmos` and `speaker_similarity` to the
    first pipeline's sounds if they can be had, `real_time_factor`, and `first_audio_seconds` until a stream of a text gives
    its first sound.

    settings: path (the recogniser, see `Recogniser`), prompts (a name in samples/prompts or a list), count, batch.
    """
    texts = bench_prompts(settings["prompts"])[: settings["count"]]
    hear, found = Recogniser(settings["path"]), {}
    first: list[Audio] = []
    for label, pipe in pipes.items():
        sounds, total = [], None
        for start in range(0, len(texts), settings["batch"]):
            said = pipe(texts[start : start + settings["batch"]], seed=seed + start, **arguments)
            sounds += said.outputs
            total = said.stats if total is None else total.plus(said.stats)
        first = first or sounds
        stream = pipe.stream(texts[0], seed=seed, **arguments)
        for _ in stream:
            pass
        heard = [h for i in range(0, len(sounds), settings["batch"]) for h in hear(sounds[i : i + settings["batch"]])]
        rated = {"dnsmos": dnsmos(sounds), "speaker_similarity": speaker_similarity(sounds, first)}
        found[label] = {
            "word_error_rate": word_error_rate(texts, heard),
            **{name: value for name, value in rated.items() if value is not None},
            "real_time_factor": total.real_time_factor if total else 0.0,
            "first_audio_seconds": stream.stats.first_output_seconds,
        }
    return found
