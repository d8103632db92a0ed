"""The codec: sound in pieces is the sound of the whole, and the vocoder's harmonics are what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from polyspec.modalities.speech.codec import Speaker, SpeechCodec
from polyspec.modalities.speech.vocoder import HIGHEST, pulses

_spec = importlib.util.spec_from_file_location("tiny_speech", Path(__file__).with_name("tiny_speech.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
tiny_codec = _module.tiny_codec


def test_pulses_are_the_sum_of_their_harmonics_and_silent_without_a_pitch() -> None:
    f0 = torch.tensor([[200.0, 200.0, 0.0]])
    phases = torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.float64)  # 200 Hz · 60 / 24000 is half a cycle
    found = pulses(f0, phases, 60, 24_000)[0]
    time = torch.arange(120, dtype=torch.float64) * 200 / 24_000
    expected = sum(torch.cos(2 * torch.pi * k * time) for k in range(1, int(HIGHEST // 200) + 1))
    assert torch.allclose(found[:120], expected.float(), atol=2e-2)
    assert not found[120:].any()


def voiced(codec: SpeechCodec) -> SpeechCodec:
    """The codec with a vocoder that is loud and has a pitch."""
    with torch.no_grad():
        codec.vocoder.leave.bias[: 2 * codec.vocoder.bins] = 6.0
        codec.vocoder.leave.bias[-1] = 1.0
        codec.vocoder.leave.weight.mul_(2)
    return codec


@pytest.mark.parametrize("sizes", [[1] * 90, [7] * 13, [40, 50], [89, 1]])
def test_sound_in_pieces_is_the_sound_of_the_whole(sizes: list[int]) -> None:
    codec = voiced(tiny_codec())
    codes = torch.randint(codec.config.codes, (90,)).tolist()
    phonemes = torch.randint(codec.config.phonemes, (90,)).tolist()
    whole = Speaker(codec).push(codes, phonemes, last=True)
    assert len(whole) == 90 * codec.samples_per_code and whole.std() > 1e-3
    speaker, parts, done = Speaker(codec, chunk=5), [], 0
    for size in sizes:
        parts.append(speaker.push(codes[done : done + size], phonemes[done : done + size]))
        done += size
    parts.append(speaker.push([], [], last=True))
    assert sum(len(p) > 0 for p in parts) > (2 if len(sizes) > 2 else 0)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-4)


def test_a_smaller_reach_would_be_heard() -> None:
    """The test above can tell: with half of the context pieces differ."""
    codec = voiced(tiny_codec())
    codes, phonemes = torch.randint(codec.config.codes, (90,)).tolist(), [1] * 90
    whole = Speaker(codec).push(codes, phonemes, last=True)
    reach = codec.reach

    class Hasty(SpeechCodec):
        reach = property(lambda self: reach // 4)  # type: ignore[assignment]

    codec.__class__ = Hasty
    speaker = Speaker(codec, chunk=5)
    parts = [speaker.push([c], [1]) for c in codes] + [speaker.push([], [], last=True)]
    assert not torch.allclose(torch.cat(parts), whole, atol=1e-3)


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    codec = voiced(tiny_codec())
    codec.save_pretrained(tmp_path)
    other = SpeechCodec.from_pretrained(tmp_path).eval()
    samples = torch.randn(1, 480)
    assert torch.equal(other.encode(samples), codec.encode(samples))
    codes = codec.complete(codec.encode(samples)[:, 0], torch.zeros(1, 20, dtype=torch.long))
    assert torch.equal(other.decode(codes)[0], codec.decode(codes)[0])
