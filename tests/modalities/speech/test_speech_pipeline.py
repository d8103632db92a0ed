"""The speech pipeline against the model's own generate, on small random models in float32."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
from recipe_needs import overrides
from torch import Tensor

import polyspec
from polyspec.cli import main
from polyspec.modalities.speech.evaluate import own_tokens, word_error_rate
from polyspec.modalities.speech.quality import dnsmos, speaker_similarity
from polyspec.modalities.speech.target import CodecFormat
from polyspec.outputs import Audio

pytest.importorskip("hibari")
_spec = importlib.util.spec_from_file_location("tiny_speech", Path(__file__).with_name("tiny_speech.py"))
assert _spec is not None and _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

TEXTS = ["A cat.", "I.", "Hi."]
RECIPES = polyspec.recipes("speech")
EXACT = [r.name for r in RECIPES if r.guarantee == "exact"]
SAME_WHEN_GREEDY = [*EXACT, "ssd", "pcg", "vadusa"]


def pipe(name: str, target: Any = None, **knobs: Any) -> Any:
    target = target or tiny.tiny_speech()
    recipe = next(r for r in RECIPES if r.name == name)
    return polyspec.pipeline("speech", target=target, recipe=name, overrides=overrides(recipe, target[0], 0.2, **knobs))


def tokens(p: Any, texts: list[str], seeds: list[int] | None = None, **knobs: Any) -> list[list[int]]:
    found = [piece for text in texts for piece in p.speech.pieces(text)]
    with torch.no_grad():
        return p.tokens(found, seeds, None, **knobs)[0]


@pytest.mark.parametrize("name", SAME_WHEN_GREEDY)
@pytest.mark.parametrize("texts", [pytest.param(TEXTS[:1], marks=pytest.mark.slow), TEXTS], ids=["one", "ragged"])
def test_greedy_tokens_are_the_models_own(name: str, texts: list[str]) -> None:
    p = pipe(name)
    found = [piece for text in texts for piece in p.speech.pieces(text)]
    assert tokens(p, texts, do_sample=False) == own_tokens(p, found, do_sample=False)


def test_multi_token_heads_that_are_checked_give_the_models_own_tokens() -> None:
    p = pipe("speech_mtp", threshold=None)
    found = [piece for text in TEXTS for piece in p.speech.pieces(text)]
    assert tokens(p, TEXTS, do_sample=False) == own_tokens(p, found, do_sample=False)


def test_shared_noise_gives_the_plain_loops_sound() -> None:
    knobs: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "seed": 3}
    plain, fast = (pipe(name)(TEXTS, **knobs).outputs for name in ("autoregressive", "gumbel_coupled"))
    assert all(torch.equal(a.waveform, b.waveform) for a, b in zip(plain, fast, strict=True))
    alone = pipe("autoregressive")(TEXTS[0], **knobs).outputs[0]
    assert torch.equal(alone.waveform, plain[0].waveform)


def test_what_is_sampled_keeps_to_the_form() -> None:
    for name in ("vadusa", "speech_mtp", "pcg"):
        p = pipe(name)
        layout = p.speech.layout
        (said,) = tokens(p, TEXTS[:1], [0], do_sample=True, temperature=1.5)
        (prompt,) = p.speech.pieces(TEXTS[0])
        spoken = [(t - layout.first_spoken) // layout.durations for t in said if t >= layout.first_spoken]
        expected = [t - layout.first_phoneme for t in p.speech.tokenizer(prompt)["input_ids"][1:-1]]
        assert spoken == expected and said[-1] == layout.end
        lasting = sum((t - layout.first_spoken) % layout.durations + 1 for t in said if t >= layout.first_spoken)
        assert sum(t < layout.codes for t in said) == lasting


def joined(stream: Any) -> Tensor:
    return torch.cat([chunk.waveform for chunk in stream], dim=1)


@pytest.mark.parametrize("name", ["autoregressive", "gumbel_coupled"])
def test_chunks_of_a_stream_are_the_whole(name: str) -> None:
    p, text = pipe(name), "Good morning, a good cat is thinking. It is."
    knobs: dict[str, Any] = {"do_sample": True, "temperature": 1.0}
    result = p(text, seed=5, **knobs)
    stream = p.stream(text, seed=5, **knobs)
    chunks = list(stream)
    assert len(chunks) > len(p.speech.pieces(text))
    whole = torch.cat([c.waveform for c in chunks], dim=1)
    assert whole.shape == result.outputs[0].waveform.shape
    assert (whole - result.outputs[0].waveform).abs().max() < 1e-3
    stats = stream.stats
    assert stats.new_tokens == result.stats.new_tokens
    assert 0 < stats.first_output_seconds < stats.wall_seconds
    assert stats.audio_seconds == pytest.approx(whole.shape[1] / p.speech.sample_rate)
    assert stats.real_time_factor == pytest.approx(stats.wall_seconds / stats.audio_seconds)


def test_a_stream_that_is_closed_stops_decoding_and_bad_knobs_are_refused_at_once() -> None:
    p = pipe("autoregressive")
    stream = p.stream("It is. It is.", seed=0)
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(polyspec.ConfigError, match="does not apply"):
        p.stream("Good morning.", guidance_scale=2.0)


def test_a_long_text_is_spoken_sentence_by_sentence() -> None:
    p = pipe("autoregressive")
    parts = [p(t, do_sample=False).outputs[0].waveform for t in ("A cat.", "It is.")]
    whole = p("A cat. It is.", do_sample=False).outputs[0].waveform
    assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-5)


def test_another_sample_rate_is_resampled() -> None:
    p = pipe("autoregressive")
    own = p("Hi.", do_sample=False).outputs[0]
    other = p("Hi.", do_sample=False, sample_rate=8000).outputs[0]
    assert other.sample_rate == 8000 and other.waveform.shape[1] == 2 * own.waveform.shape[1]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"prompt": ""}, "text is empty"),
        ({"prompt": []}, "text is empty"),
        ({"prompt": "***"}, "can be spoken"),
        ({"prompt": "Hello.", "sample_rate": 5}, "sample_rate must be"),
        ({"prompt": "Hello.", "do_sample": True, "temperature": 0.0}, "temperature"),
        ({"prompt": "Hello.", "seed": [1, 2]}, "seed has 2 entries"),
    ],
)
def test_bad_requests_are_refused_before_the_model_runs(arguments: dict, fragment: str) -> None:
    p, calls = pipe("autoregressive"), []
    handle = p.model.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(polyspec.PolyspecError, match=fragment):
            p(**arguments)
    finally:
        handle.remove()
    assert not calls


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model, tokenizer, _ = tiny.tiny_speech()
    with pytest.raises(polyspec.CheckpointError, match="do not belong together"):
        polyspec.pipeline("speech", target=(model, tokenizer, tiny.tiny_codec(codes=25)))
    model.save_pretrained(tmp_path)
    with pytest.raises(polyspec.CheckpointError, match="codec"):
        polyspec.pipeline("speech", target=str(tmp_path))


def test_the_command_line_writes_a_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, codec = tiny.tiny_speech()
    for part, folder in ((model, "m"), (tokenizer, "m"), (codec, "m/codec")):
        part.save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    arguments = ["modality=speech", "target=m", "prompt=Hi.", "output=hello.wav", "dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["polyspec", *arguments])
    main()
    assert "wrote hello.wav" in capsys.readouterr().out
    samples, rate = soundfile.read(tmp_path / "hello.wav")
    assert rate == 4000 and len(samples) > 0


# -- models with a codec of transformers --------------------------------------------------------------------------------


def codec_target(codec: Any, codebooks: int) -> tuple[Any, ...]:
    model, tokenizer, _ = tiny.tiny_speech()
    return model, tokenizer, codec, CodecFormat(first_code=30, codes=8, codebooks=codebooks, end=29, frames=9)


@pytest.mark.parametrize(("make", "codebooks"), [(tiny.tiny_mimi, 3), (tiny.tiny_dac, 2)], ids=["mimi", "dac"])
@pytest.mark.parametrize("name", ["speculative_sampling", "dflash", "pcg"])
def test_a_llama_with_a_codec_of_transformers_says_what_generate_says(make: Any, codebooks: int, name: str) -> None:
    codec = make()
    p = pipe(name, codec_target(codec, codebooks))
    said = tokens(p, ["hello", "ɡʊd mˈɔɹnɪŋ"], do_sample=False)
    assert said == own_tokens(p, ["hello", "ɡʊd mˈɔɹnɪŋ"], do_sample=False)
    codes = [t - 30 for t in said[0] if t != 29]
    frames = torch.tensor(codes[: len(codes) // codebooks * codebooks]).view(1, -1, codebooks).transpose(1, 2)
    own = codec.decode(audio_codes=frames - 8 * torch.arange(codebooks)[:, None]).audio_values.flatten()
    spoken = p("hello", do_sample=False).outputs[0]
    assert torch.equal(spoken.waveform[0], own.detach().clamp(-1, 1)) and spoken.sample_rate == 400
    assert joined(p.stream("hello", do_sample=False)).shape[1] == len(own)


def test_codes_that_do_not_fit_the_model_are_refused() -> None:
    model, tokenizer, _ = tiny.tiny_speech()
    for form in (CodecFormat(model.config.vocab_size - 23, 8, 3, end=29), CodecFormat(30, 9, 3, end=29)):
        with pytest.raises(polyspec.CheckpointError, match="CodecFormat"):
            polyspec.pipeline("speech", target=(model, tokenizer, tiny.tiny_mimi(), form))


def test_words_left_out_added_and_wrong_are_counted() -> None:
    assert word_error_rate(["The cat sat.", "on a mat"], ["the cat sat", "on mat now"]) == pytest.approx(2 / 6)
    assert word_error_rate(["one two"], [""]) == 1.0
    assert word_error_rate(["It's ten o’clock, Mr. Bear!"], ["it is 10 o'clock mister bear"]) == 0


def test_ratings_are_of_the_sound_at_the_model_s_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def run(wave: Any, rate: int) -> dict[str, float]:
        asked.append((len(wave), rate))
        return {"ovrl_mos": 1.0 + len(asked)}

    package = ModuleType("speechmos")
    package.dnsmos = SimpleNamespace(run=run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "speechmos", package)
    assert dnsmos([Audio(torch.zeros(1, 12_000), 24_000), Audio(torch.zeros(1, 16_000), 16_000)]) == 2.5
    assert asked == [(8_000, 16_000), (16_000, 16_000)]
    monkeypatch.setitem(sys.modules, "speechmos", None)
    assert dnsmos([Audio(torch.zeros(1, 16_000), 16_000)]) is None


def test_voices_are_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    class VoiceEncoder:
        def __init__(self, device: str, verbose: bool):
            pass

        def embed_utterance(self, wave: Any) -> Any:
            assert len(wave) == 16_000
            return torch.tensor([float(wave.mean()), 1.0]).numpy()

    package = ModuleType("resemblyzer")
    package.VoiceEncoder = VoiceEncoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "resemblyzer", package)
    low, high = Audio(torch.zeros(1, 16_000), 16_000), Audio(torch.ones(1, 16_000), 16_000)
    assert speaker_similarity([low, high], [low, low]) == pytest.approx((1 + 0.5**0.5) / 2)
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    assert speaker_similarity([low], [low]) is None
