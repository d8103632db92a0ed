"""How well a recogniser understands what recipes say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchaudio
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


def bench_quality(
    pipes: Mapping[str, Any], settings: Mapping[str, Any], arguments: Mapping[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """For each pipeline, by label: `word_error_rate` of what the recogniser hears, `real_time_factor`, and
    `first_audio_seconds` until a stream of a text gives its first sound.

    settings: path (the recogniser, see `Recogniser`), prompts (a name in samples/prompts or a list), count, batch.
    """
    texts = bench_prompts(settings["prompts"])[: settings["count"]]
    hear, found = Recogniser(settings["path"]), {}
    for label, pipe in pipes.items():
        heard, total = [], None
        for start in range(0, len(texts), settings["batch"]):
            said = pipe(texts[start : start + settings["batch"]], seed=seed + start, **arguments)
            heard += hear(said.outputs)
            total = said.stats if total is None else total.plus(said.stats)
        stream = pipe.stream(texts[0], seed=seed, **arguments)
        for _ in stream:
            pass
        found[label] = {
            "word_error_rate": word_error_rate(texts, heard),
            "real_time_factor": total.real_time_factor if total else 0.0,
            "first_audio_seconds": stream.stats.first_output_seconds,
        }
    return found
