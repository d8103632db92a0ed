"""The codec of the speech sample: 40 codes a second of 24 kHz speech, a waveform from them, whole or piece by piece.

A convolutional encoder turns a log-mel spectrogram into vectors, two residual codebooks (SoundStream, 2107.03312) turn those
into codes. A language model speaks the first codebook; a small convolutional network guesses the second from the first and
the phonemes, a decoder turns both into a mel, a vocoder that into sound.

Everything behind the codes has a finite reach: `Speaker` decodes a window with that much context on either side, so what it
gives in pieces is what a whole utterance gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torchaudio
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from polyspec.modalities.speech.vocoder import ConvBlock, Vocoder


class SpeechCodecConfig(PreTrainedConfig):
    """Sizes. `stride` frames of `hop` samples make a code; `phonemes` is how many kinds there are."""

    model_type = "polyspec_speech_codec"
    sample_rate: int = 24_000
    n_fft: int = 1200
    hop: int = 300
    mels: int = 80
    stride: int = 2
    width: int = 192
    codes: int = 1024
    code_size: int = 16
    codebooks: int = 2
    phonemes: int = 96
    kernel: int = 5
    token_blocks: int = 3
    frame_blocks: int = 2
    vocoder_blocks: int = 4
    vocoder_kernel: int = 7


class SpeechCodec(PreTrainedModel):
    """The whole codec; in float32 whatever its weights are stored in."""

    config_class = SpeechCodecConfig
    config: SpeechCodecConfig
    main_input_name = "codes"

    def __init__(self, config: SpeechCodecConfig):
        super().__init__(config)
        c, width = config, config.width
        self.encoder = nn.Sequential(
            nn.Conv1d(c.mels, width, 3, padding=1),
            *(ConvBlock(width, c.kernel) for _ in range(c.frame_blocks)),
            nn.Conv1d(width, width, c.stride, stride=c.stride),
            *(ConvBlock(width, c.kernel) for _ in range(c.token_blocks)),
            nn.Conv1d(width, c.code_size, 1),
        )
        self.quantiser = ResidualQuantiser(c.codebooks, c.codes, c.code_size)
        self.residual = ResidualPredictor(c)
        self.decoder = nn.Sequential(
            nn.Conv1d(c.code_size, width, 3, padding=1),
            *(ConvBlock(width, c.kernel) for _ in range(c.token_blocks)),
            nn.ConvTranspose1d(width, width, c.stride, stride=c.stride),
            *(ConvBlock(width, c.kernel) for _ in range(c.frame_blocks)),
            nn.Conv1d(width, c.mels, 1),
        )
        self.vocoder = Vocoder(c.mels, width, c.vocoder_blocks, c.vocoder_kernel, c.n_fft, c.hop, c.sample_rate)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation stands."""

    @property
    def samples_per_code(self) -> int:
        return self.config.hop * self.config.stride

    @property
    def reach(self) -> int:
        """How many codes to either side a sample may depend on."""
        c = self.config
        frames = c.frame_blocks * (c.kernel // 2) + self.vocoder.reach
        return 2 * (1 + c.token_blocks * (c.kernel // 2)) + -(-frames // c.stride)

    def mel(self, waveform: Tensor) -> Tensor:
        """Normalised log-mel `[B, mels, T / hop]` of samples `[B, T]`, T a multiple of hop."""
        c = self.config
        window = torch.hann_window(c.n_fft, device=waveform.device)
        spectrum = torch.stft(waveform, c.n_fft, c.hop, window=window, pad_mode="constant", return_complex=True)[
            ..., :-1
        ]
        banks = mel_banks(c.n_fft // 2 + 1, c.mels, c.sample_rate).to(waveform.device)
        return ((banks.T @ spectrum.abs()).clamp(min=1e-4).log() + 2) / 4

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Samples `[B, T]` to codes `[B, codebooks, T / samples_per_code]`."""
        return self.quantiser.lookup(self.encoder(self.mel(waveform)))

    @torch.no_grad()
    def complete(self, codes: Tensor, phonemes: Tensor) -> Tensor:
        """First codes and phonemes `[B, T]` to codes of all codebooks `[B, codebooks, T]`."""
        return torch.stack([codes, self.residual(codes, phonemes).argmax(1)], dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor, phase: Tensor | None = None, first: int = 0, at: int = 0) -> tuple[Tensor, Tensor]:
        """Codes `[B, codebooks, T]` to samples `[B, T · samples_per_code]` and phases, as `Vocoder.forward`; first: how many
        codes lie before them; phase `[B]`: that which the at-th of them begins with."""
        phase = torch.zeros(len(codes), device=codes.device) if phase is None else phase
        stride = self.config.stride
        return self.vocoder(self.decoder(self.quantiser.vectors(codes)), phase, first * stride, at * stride)


class ResidualQuantiser(nn.Module):
    """Codebooks of moving averages, each of what the ones before leave: `[B, d, T]` to codes `[B, levels, T]`."""

    def __init__(self, levels: int, size: int, width: int):
        super().__init__()
        self.codes: Tensor
        self.uses: Tensor
        self.register_buffer("codes", torch.randn(levels, size, width))
        self.register_buffer("uses", torch.zeros(levels, size))

    def nearest(self, z: Tensor, level: int) -> Tensor:
        """Of vectors `[n, d]` the nearest codes `[n]`."""
        book = self.codes[level]
        return (book.square().sum(-1) - 2 * z @ book.T).argmin(-1)

    def lookup(self, z: Tensor) -> Tensor:
        rest, found = z.transpose(1, 2).flatten(0, 1), []
        for level in range(len(self.codes)):
            found.append(self.nearest(rest, level))
            rest = rest - self.codes[level][found[-1]]
        return torch.stack(found).view(len(found), len(z), -1).transpose(0, 1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codes `[B, levels, T]` of the first `levels` codebooks to what they stand for, `[B, d, T]`."""
        return sum(self.codes[i][codes[:, i]] for i in range(codes.shape[1])).transpose(1, 2)  # type: ignore[union-attr]

    @torch.no_grad()
    def learn(self, z: Tensor, index: Tensor, level: int, decay: float = 0.99, dead: float = 0.1) -> None:
        """Move the codes of a codebook towards the vectors `z [n, d]` that fell to them (`index [n]`); those that
        less than a share `dead` of an even one fell to restart from the worst-quantised vectors."""
        book, uses = self.codes[level], self.uses[level]
        counts = torch.bincount(index, minlength=len(book)).to(z)
        means = torch.zeros_like(book).index_add_(0, index, z) / counts.clamp(min=1)[:, None]
        uses.mul_(decay).add_(counts, alpha=1 - decay)
        share = ((1 - decay) * counts / uses.clamp(min=1e-9)).clamp(max=1)  # what a moving average of sums would give
        book.lerp_(means, share[:, None])
        lost = (uses < dead * len(z) / len(book)).nonzero()[:, 0]
        if len(lost):
            error = (z - book[index]).square().sum(-1)
            worst = error.topk(min(len(z), 4 * len(lost))).indices
            chosen = worst[torch.randperm(len(worst), device=z.device)[: len(lost)]]
            book[lost[: len(chosen)]] = z[chosen]
            uses[lost[: len(chosen)]] = len(z) / len(book)


class ResidualPredictor(nn.Module):
    """Logits of the second code `[B, codes, T]` from first codes and phonemes `[B, T]`, all at once."""

    def __init__(self, c: SpeechCodecConfig):
        super().__init__()
        self.code, self.phoneme = nn.Embedding(c.codes, c.width), nn.Embedding(c.phonemes, c.width)
        self.blocks = nn.Sequential(*(ConvBlock(c.width, c.kernel) for _ in range(c.token_blocks)))
        self.leave = nn.Conv1d(c.width, c.codes, 1)

    def forward(self, codes: Tensor, phonemes: Tensor) -> Tensor:
        return self.leave(self.blocks((self.code(codes) + self.phoneme(phonemes)).transpose(1, 2)))


class Speaker:
    """Turns the codes of one utterance into samples as they come; holds back what later codes may still change.

    chunk: how many codes' worth of samples are given at once, at least, before the end.
    """

    def __init__(self, codec: SpeechCodec, chunk: int = 16):
        self.codec, self.chunk = codec, chunk
        self.codes: list[int] = []
        self.phonemes: list[int] = []
        self.given = 0
        self.phase = torch.zeros(1, dtype=torch.float64)  # at the first sample that has not been given

    def push(self, codes: Sequence[int], phonemes: Sequence[int], last: bool = False) -> Tensor:
        """Samples `[T]`, none at times, that can be given once the next `codes` of `phonemes` are known."""
        self.codes += codes
        self.phonemes += phonemes
        reach, stride = self.codec.reach, self.codec.config.stride
        until = len(self.codes) if last else len(self.codes) - reach
        if until - self.given < (1 if last else self.chunk):
            return torch.zeros(0)
        start = max(0, self.given - reach)
        device = self.codec.device
        known, spoken = (torch.tensor([x[start:]], device=device) for x in (self.codes, self.phonemes))
        complete = self.codec.complete(known, spoken)
        samples, phases = self.codec.decode(complete, self.phase.to(device), start, self.given - start)
        size = self.codec.samples_per_code
        self.phase = phases[:, (until - start) * stride].cpu()
        found = samples[0, (self.given - start) * size : (until - start) * size]
        self.given = until
        return found.cpu()


@cache
def mel_banks(bins: int, mels: int, sample_rate: int) -> Tensor:
    """`[bins, mels]`"""
    return torchaudio.functional.melscale_fbanks(bins, 0.0, sample_rate / 2, mels, sample_rate)
