"""From a log-mel spectrogram to a waveform: harmonics of a predicted pitch and noise, each filtered frame by frame.

    S = H · STFT(Σ_k cos 2πkφ) + N · STFT(noise),    φ' = f0,    waveform = inverse STFT of S

H and N are real envelopes and f0 a pitch, all predicted from the mel by a few convolutions (a source-filter model as in
DDSP, 2001.04643, with the inverse STFT as last layer as in Vocos, 2306.00814). Nothing has to be invented about phase, so
spectral losses alone train it. A frame depends on `reach` others on either side and on the phase that it starts with: a
window with that much context gives the same samples as the whole utterance.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

HIGHEST = 11_000.0
"""Hz; harmonics above it are left to the noise."""
NOISE = 65_521
"""Samples after which the noise repeats."""


class ConvBlock(nn.Module):
    """ConvNeXt (2201.03545) in one dimension: `[B, d, T]` to `[B, d, T]`; sees `kernel // 2` places to either side."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).transpose(1, 2))
        return x + self.narrow(functional.gelu(self.wide(y))).transpose(1, 2)


class Vocoder(nn.Module):
    """mel `[B, mels, F]` to samples `[B, F · hop]`."""

    def __init__(self, mels: int, width: int, blocks: int, kernel: int, n_fft: int, hop: int, sample_rate: int):
        super().__init__()
        self.n_fft, self.hop, self.sample_rate, self.bins = n_fft, hop, sample_rate, n_fft // 2 + 1
        self.reach = 1 + blocks * (kernel // 2) + n_fft // hop
        self.enter = nn.Conv1d(mels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(width, kernel) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 2 * self.bins + 2)

    def predict(self, mel: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log envelopes of harmonics and noise `[B, bins, F]`, log2 of the pitch over 200 Hz and the logit of there being
        one `[B, F]`."""
        x = self.leave(self.norm(self.blocks(self.enter(mel)).transpose(1, 2)))
        harmonic, noise, pitch, voiced = x.split([self.bins, self.bins, 1, 1], dim=-1)
        return (harmonic - 6).transpose(1, 2), (noise - 6).transpose(1, 2), pitch[..., 0], voiced[..., 0]

    def forward(self, mel: Tensor, phase: Tensor, first: int = 0, at: int = 0) -> tuple[Tensor, Tensor]:
        """Samples `[B, F · hop]` of frames first, first + 1, … and the phase in cycles that each of them and the one
        behind them starts with `[B, F + 1]`, float64. phase `[B]`: that of frame first + at."""
        harmonic, noise, pitch, voiced = self.predict(mel)
        f0 = torch.where(voiced > 0, 200 * 2 ** pitch.clamp(-2, 2), 0)
        return self.synthesise(harmonic, noise, f0, phase, first, at)

    def synthesise(
        self, harmonic: Tensor, noise: Tensor, f0: Tensor, phase: Tensor, first: int | Tensor = 0, at: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The same from log envelopes `[B, bins, F]` and pitch `[B, F]` in Hz, 0 where there is none."""
        step = f0.double() * (self.hop / self.sample_rate)
        since = functional.pad(step.cumsum(1), (1, 0))
        phases = (phase.double()[:, None] + since - since[:, at, None]) % 1.0
        window = torch.hann_window(self.n_fft, device=f0.device)

        def spectrum(x: Tensor) -> Tensor:
            return torch.stft(x, self.n_fft, self.hop, window=window, pad_mode="constant", return_complex=True)

        source = spectrum(pulses(f0, phases[:, :-1], self.hop, self.sample_rate)) / (self.n_fft / 4)
        width = f0.shape[1] * self.hop
        place = torch.as_tensor(first, device=f0.device).reshape(-1, 1) * self.hop + torch.arange(
            width, device=f0.device
        )
        hiss = spectrum(noise_table().to(f0.device)[place % NOISE].expand(len(f0), -1)) / window.square().sum().sqrt()
        h, n = (functional.pad(x, (0, 1), mode="replicate").clamp(max=7).exp() for x in (harmonic, noise))
        samples = torch.istft(h * source + n * hiss, self.n_fft, self.hop, window=window, length=width)
        return samples, phases


def pulses(f0: Tensor, phases: Tensor, hop: int, sample_rate: int) -> Tensor:
    """Σ_k cos 2πkφ over the harmonics below `HIGHEST`, `[B, F · hop]`, of a pitch `f0 [B, F]` in Hz that is constant in each
    frame, whose phases begin with `phases [B, F]` in cycles; 0 where f0 is 0."""
    inside = torch.arange(hop, device=f0.device, dtype=torch.float64) / sample_rate
    phase = ((phases[..., None] + f0.double()[..., None] * inside + 0.5) % 1.0 - 0.5).flatten(1).float()
    count = (HIGHEST / f0.clamp(min=1)).floor().repeat_interleave(hop, dim=1)
    below = torch.sin(torch.pi * phase)
    peak = below.abs() < 1e-4  # where the closed form is 0 / 0
    kernel = torch.sin((2 * count + 1) * torch.pi * phase) / torch.where(peak, 1, below)
    total = torch.where(peak, count, (kernel - 1) / 2)
    return torch.where((f0 > 0).repeat_interleave(hop, dim=1), total, 0)


@cache
def noise_table() -> Tensor:
    """`[NOISE]` normal numbers, the same everywhere, so that a sample's noise depends on where it is alone."""
    return torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
