"""Stages 1 to 3: the codec, its vocoder, and the prediction of the second codebook from the first.

Each trains a part of one `SpeechCodec` and leaves the rest alone; each continues from the folder of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from polyspec.modalities.speech.codec import SpeechCodec
from polyspec.training.trainer import Schedule, fit

Losses = dict[str, Tensor]


class Crops(Dataset[dict[str, Any]]):
    """Stretches of `codes` codes' worth of sound from the shards of `make_audio`."""

    def __init__(self, shards: Sequence[dict[str, np.ndarray]], codes: int, size: int, hop: int):
        self.shards, self.size, self.hop = shards, size * codes, hop
        starts = [np.cumsum([0, *s["lengths"][:-1]]) for s in shards]
        self.index = [
            (shard, int(start + offset) * size)
            for shard, s in enumerate(shards)
            for start, length in zip(starts[shard], s["lengths"], strict=True)
            for offset in range(0, max(1, int(length) - codes + 1), codes // 2)
            if length >= codes
        ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, Any]:
        shard, start = self.index[item]
        stored, end = self.shards[shard], start + self.size
        pitch = stored["pitch"][start // self.hop : end // self.hop].astype(np.float32)
        return {
            "samples": torch.from_numpy(stored["samples"][start:end] / np.float32(32767)),
            "pitch": torch.from_numpy(pitch),
        }


class Aligned(Dataset[dict[str, Any]]):
    """Sentences from the shards of `make_codes`: `codes [2, T]`, `phonemes [P]`, `durations [P]`."""

    def __init__(self, shards: Sequence[dict[str, np.ndarray]]):
        self.rows = []
        for s in shards:
            ends = s["lengths"].cumsum(0)
            for (phonemes, codes), (p, t) in zip(s["lengths"], ends, strict=True):
                part = slice(p - phonemes, p)
                self.rows.append((s["codes"][:, t - codes : t], s["phonemes"][part], s["durations"][part]))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Codes of each."""
        return [codes.shape[1] for codes, _, _ in self.rows]

    def __getitem__(self, item: int) -> dict[str, Any]:
        names = ("codes", "phonemes", "durations")
        return {n: torch.from_numpy(x.astype(np.int64)) for n, x in zip(names, self.rows[item], strict=True)}


def train_codec(model: SpeechCodec, data: Crops, schedule: Schedule, output: Path) -> dict[str, float]:
    """Encoder, codebooks and decoder: the mel through both codebooks, or, in half of the rows, through the first."""
    return train_part(
        model, (model.encoder, model.quantiser, model.decoder), lambda _: codec_losses, data, schedule, output
    )


def codec_losses(model: SpeechCodec, batch: dict[str, Any], commitment: float = 0.25) -> Losses:
    mel = model.mel(batch["samples"])
    z = model.encoder(mel)
    rest, total = z.detach().transpose(1, 2).flatten(0, 1), torch.zeros_like(z)
    alone = torch.rand(len(z), 1, 1, device=z.device) < 0.5
    usage = {}
    for level in range(model.config.codebooks):
        index = model.quantiser.nearest(rest, level)
        if not model.quantiser.uses[level].any():  # begin among the vectors
            model.quantiser.codes[level].copy_(rest[torch.randint(len(rest), (model.config.codes,), device=z.device)])
            index = model.quantiser.nearest(rest, level)
            model.quantiser.uses[level].fill_(len(rest) / model.config.codes)
        vector = model.quantiser.codes[level][index]
        model.quantiser.learn(rest, index, level)
        rest = rest - vector
        part = vector.view(len(z), -1, z.shape[1]).transpose(1, 2)
        total = total + (part if level == 0 else part.masked_fill(alone, 0))
        uses = model.quantiser.uses[level] / model.quantiser.uses[level].sum()
        usage[f"bits_{level + 1}"] = torch.special.entr(uses).sum() / np.log(2)
    error = model.decoder(z + (total - z).detach()) - mel
    loss = error.square().mean() + 0.5 * error.abs().mean() + commitment * (z - total).square().mean()
    return {"loss": loss, "mel": error.abs().mean(), **usage}


def train_vocoder(model: SpeechCodec, data: Crops, schedule: Schedule, output: Path) -> dict[str, float]:
    """The vocoder, from what the decoder makes of the codes as often as from the real mel."""
    return train_part(model, (model.vocoder,), lambda _: vocoder_losses, data, schedule, output)


def vocoder_losses(model: SpeechCodec, batch: dict[str, Any]) -> Losses:
    samples, pitch = batch["samples"], batch["pitch"]
    with torch.no_grad():
        mel = model.mel(samples)
        decoded = model.decoder(model.quantiser.vectors(model.quantiser.lookup(model.encoder(mel))))
        mel = torch.where(torch.rand(len(mel), 1, 1, device=mel.device) < 0.3, mel, decoded)
    harmonic, noise, log_pitch, voiced = model.vocoder.predict(mel)
    start = torch.rand(len(pitch), device=pitch.device)  # any phase, any noise: neither can be told from a mel
    first = torch.randint(10_000, (len(pitch),), device=pitch.device)
    made, _ = model.vocoder.synthesise(harmonic, noise, pitch, start, first)
    is_voiced = pitch > 0
    goal = (pitch.clamp(min=1) / 200).log2()
    off = (log_pitch - goal).abs().mul(is_voiced).sum() / is_voiced.sum().clamp(min=1)
    voicing = functional.binary_cross_entropy_with_logits(voiced, is_voiced.float())
    spectral = spectral_loss(made, samples)
    return {"loss": spectral + 2 * off + 0.3 * voicing, "spectral": spectral, "octaves": off, "voicing": voicing}


def spectral_loss(made: Tensor, real: Tensor, sizes: Sequence[int] = (512, 1024, 2048)) -> Tensor:
    """Mean over window sizes of the L1 distance of log magnitudes and the relative L2 distance of magnitudes."""
    total = made.new_zeros(())
    for size in sizes:
        window = torch.hann_window(size, device=made.device)
        a, b = (torch.stft(x, size, size // 4, window=window, return_complex=True).abs() for x in (made, real))
        distance = (a.clamp(min=1e-3).log() - b.clamp(min=1e-3).log()).abs().mean()
        total = total + distance + (a - b).norm() / b.norm().clamp(min=1e-3)
    return total / len(sizes)


def train_residual(model: SpeechCodec, data: Aligned, schedule: Schedule, output: Path) -> dict[str, float]:
    """The prediction of second codes."""
    return train_part(model, (model.residual,), lambda _: residual_losses, data, schedule, output, collate_codes)


def residual_losses(model: SpeechCodec, batch: dict[str, Any]) -> Losses:
    logits = model.residual(batch["codes"][:, 0], batch["phonemes"])
    goal = batch["codes"][:, 1].masked_fill(~batch["real"], -100)
    right = (logits.argmax(1) == goal).sum() / batch["real"].sum()
    return {"loss": functional.cross_entropy(logits, goal), "accuracy": right}


def collate_codes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows padded on the right: codes `[B, 2, T]`, the phoneme of each code `[B, T]`, real `[B, T]`."""
    longest = max(r["codes"].shape[1] for r in rows)
    spoken = [r["phonemes"].repeat_interleave(r["durations"]) for r in rows]
    return {
        "codes": torch.stack([functional.pad(r["codes"], (0, longest - r["codes"].shape[1])) for r in rows]),
        "phonemes": torch.stack([functional.pad(s, (0, longest - len(s))) for s in spoken]),
        "real": torch.stack([torch.arange(longest) < len(s) for s in spoken]),
    }


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.stack([r[key] for r in rows]) for key in rows[0]}


def train_part(
    model: SpeechCodec,
    parts: Sequence[nn.Module],
    begin: Callable[[Any], Callable[..., Losses]],
    data: Dataset[dict[str, Any]],
    schedule: Schedule,
    output: Path,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = stack,
) -> dict[str, float]:
    """`fit` with all but `parts` of the model frozen."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    return fit(model, begin, data, collate, schedule, output)
