"""The shipped voice: it says a sentence, of about the length that it should have, and the same with drafts."""

from __future__ import annotations

import torch

import polyspec

TEXT = "The cat went to the park."


def test_it_speaks_and_finds_the_end() -> None:
    audio = polyspec.pipeline("speech")(TEXT, seed=0).outputs[0]
    assert audio.sample_rate == 24_000
    assert 1.0 < audio.waveform.shape[-1] / 24_000 < 4.0
    assert 0.01 < float(audio.waveform.abs().mean()) < 0.5


def test_drafts_do_not_change_the_sound() -> None:
    plain, fast = (
        polyspec.pipeline("speech", recipe=recipe, dtype="float32")(TEXT, do_sample=False).outputs[0]
        for recipe in ("autoregressive", "lookahead")
    )
    assert torch.equal(plain.waveform, fast.waveform)
