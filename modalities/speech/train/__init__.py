"""Training the speech sample, in stages that each continue where an interrupted run stopped:

1. `codec`     waveform <-> two codebooks at 40 codes a second, by way of a log-mel spectrogram;
2. `vocoder`   the mel to a waveform;
3. `residual`  the second codebook from the first and the phonemes;
4. `lm`        a Llama that speaks: phonemes and first codes by turns.

Before 1 some sentences are spoken by hibari-tts, before 3 all of them are, and encoded. `train` runs all and exports the
sample; `polyspec task=train modality=speech` calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import hydra
import torch

from polyspec.modalities.speech.codec import SpeechCodec, SpeechCodecConfig
from polyspec.modalities.speech.phonemes import Layout, alphabet, new_tokenizer
from polyspec.modalities.speech.train.codec import Aligned, Crops, train_codec, train_residual, train_vocoder
from polyspec.modalities.speech.train.data import DataConfig, make_audio, make_codes
from polyspec.modalities.speech.train.export import export_sample
from polyspec.modalities.speech.train.language_model import LMConfig, train_lm

__all__ = ["DataConfig", "LMConfig", "train"]


def train(config: Mapping[str, Any]) -> dict[str, float]:
    """All stages and the export, as `conf/train/speech.yaml` describes them; run again, it continues where it stopped.

    `config` holds `data` and `lm` (nodes of the `Config` classes), `codec` (sizes), `schedules` (one a stage), `output`, a
    folder for checkpoints, and `export`, the folder for the finished sample. Returns the figures of the model card.
    """
    parts = hydra.utils.instantiate(config, _convert_="all")
    data, schedules, output = parts["data"], parts["schedules"], Path(parts["output"])
    names = alphabet()
    torch.manual_seed(schedules["codec"].seed)
    codec = SpeechCodec(SpeechCodecConfig(phonemes=len(names) + 1, **parts["codec"]))
    size, hop = codec.samples_per_code, codec.config.hop

    audio = make_audio(data, output / "audio")
    figures = {"codec": train_codec(codec, Crops(audio, 40, size, hop), schedules["codec"], output / "codec")}
    figures["vocoder"] = train_vocoder(codec, Crops(audio, 24, size, hop), schedules["vocoder"], output / "vocoder")
    del audio
    aligned = Aligned(make_codes(data, codec, fingerprint(codec), output / "codes"))
    figures["residual"] = train_residual(codec, aligned, schedules["residual"], output / "residual")
    tokenizer = new_tokenizer(codec.config.codes, names)
    model, figures["lm"] = train_lm(parts["lm"], Layout.of(tokenizer), aligned, schedules["lm"], output / "lm")
    return export_sample(model, tokenizer, codec, figures, asdict(data), Path(parts["export"]))


def fingerprint(codec: SpeechCodec) -> str:
    """Tells codecs apart whose codes mean different things."""
    return sha256(codec.quantiser.codes.numpy().tobytes()).hexdigest()[:16]
