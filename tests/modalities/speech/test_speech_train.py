"""Training of the speech sample: its configuration reaches the code, rows are what the pipeline presents, stages do learn."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import polyspec.conf
from polyspec.modalities.speech.codec import ResidualQuantiser
from polyspec.modalities.speech.phonemes import Interleaved, Layout, new_tokenizer
from polyspec.modalities.speech.train import DataConfig, LMConfig
from polyspec.modalities.speech.train.codec import Aligned, Crops
from polyspec.modalities.speech.train.data import read_sentences
from polyspec.modalities.speech.train.language_model import Collate, new_model, row_of
from polyspec.training import Schedule

LAYOUT = Layout.of(TOKENIZER := new_tokenizer(8, "abc"))
SHARD = {
    "phonemes": np.array([0, 1, 2, 0, 0, 3, 0]),
    "durations": np.array([2, 1, 3, 1, 1, 2, 1]),
    "codes": np.array([[0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4], [*range(8), 0, 1, 2]]),
    "lengths": np.array([[4, 7], [3, 4]]),
}


def test_every_node_of_the_shipped_configuration_becomes_what_the_stages_take() -> None:
    config = OmegaConf.load(Path(str(polyspec.conf.__file__)).with_name("train") / "speech.yaml")
    config.data.path = "sentences.txt"
    parts = hydra.utils.instantiate(OmegaConf.create({"train": config}).train, _convert_="all")
    assert type(parts["data"]) is DataConfig and type(parts["lm"]) is LMConfig
    assert {stage: type(s) for stage, s in parts["schedules"].items()} == dict.fromkeys(
        ("codec", "vocoder", "residual", "lm"), Schedule
    )
    assert parts["schedules"]["lm"].minutes == config.minutes.lm
    module, _, function = parts["entry"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_a_row_begins_as_the_tokenizer_has_it_and_keeps_to_the_form() -> None:
    rows = Aligned([SHARD])
    assert len(rows) == 2
    tokens, prompt = row_of(rows[0], LAYOUT)
    assert tokens[:prompt].tolist() == TOKENIZER("ab")["input_ids"]
    edge, a, b, last = TOKENIZER.convert_tokens_to_ids(["#:2", "a:1", "b:3", "#:1"])
    said = [edge, 0, 1, a, 2, b, 3, 4, 5, last, 6, LAYOUT.end]
    assert tokens[prompt:].tolist() == said
    form = Interleaved(LAYOUT)
    for row in range(2):
        tokens, prompt = row_of(rows[row], LAYOUT)
        for at in range(prompt, len(tokens)):
            assert form(tokens[None, :at], torch.zeros(1, LAYOUT.size))[0, tokens[at]] == 0


def test_a_spoken_phoneme_begins_as_the_text_s_own() -> None:
    model = new_model(LMConfig(hidden_size=64, layers=1), LAYOUT)
    table = model.get_input_embeddings().weight.detach()
    text = torch.nn.functional.normalize(table[LAYOUT.first_phoneme : LAYOUT.first_spoken], dim=1)
    spoken = torch.nn.functional.normalize(table[LAYOUT.first_spoken :], dim=1).view(LAYOUT.phonemes, LAYOUT.durations, -1)
    likest = torch.einsum("pdh,qh->pdq", spoken, text).argmax(-1)
    assert (likest == torch.arange(LAYOUT.phonemes)[:, None]).all()
    assert (spoken[:, 0] - spoken[:, 1]).norm(dim=1).min() > 0.1


def test_contexts_are_corrupted_in_codes_only_and_labels_are_not() -> None:
    rows = [Aligned([SHARD])[i] for i in (0, 1)] * 50
    batch = Collate(LMConfig(corruption=1.0, clean=0.0), LAYOUT)(rows)
    true = Collate(LMConfig(corruption=1.0, clean=1.0), LAYOUT)(rows)
    assert torch.equal(batch["labels"], true["labels"])
    changed = batch["context"] != true["context"]
    assert changed.any() and (true["context"][changed] < 8).all() and (batch["context"][changed] < 8).all()


def test_crops_hold_the_sound_and_the_pitch_of_the_same_moment() -> None:
    samples = np.arange(11 * 4, dtype=np.int16)
    shard = {"samples": samples, "pitch": (samples[::2] / 2).astype(np.float16), "lengths": np.array([7, 4])}
    crops = Crops([shard], codes=4, size=4, hop=2)
    for crop in (crops[i] for i in range(len(crops))):
        first = crop["samples"][0] * 32767
        assert len(crop["samples"]) == 16 and len(crop["pitch"]) == 8
        assert float(crop["pitch"][0]) == pytest.approx(float(first) / 2)


CENTRES = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])


def learnt(codes: torch.Tensor, steps: int) -> torch.Tensor:
    """Codes after training on vectors around `CENTRES`."""
    quantiser = ResidualQuantiser(1, 3, 2)
    quantiser.codes[0] = codes
    quantiser.uses.fill_(64 / 3)
    for _ in range(steps):
        z = CENTRES[torch.randint(3, (64,))] + 0.1 * torch.randn(64, 2)
        quantiser.learn(z, quantiser.nearest(z, 0), 0)
    return quantiser.codes[0]


def test_codes_move_to_the_mean_of_what_falls_to_them() -> None:
    assert torch.allclose(learnt(CENTRES + 0.5, 600), CENTRES, atol=0.05)


def test_a_dead_code_restarts_where_vectors_are_worst_quantised() -> None:
    far = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, -90.0]])
    assert torch.allclose(learnt(far, 1000), CENTRES, atol=0.05)


def test_too_few_sentences_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(polyspec.InputError, match="cannot read sentences"):
        read_sentences(DataConfig(str(tmp_path / "none.txt")))
    (tmp_path / "few.txt").write_text("One.\nTwo.\n")
    with pytest.raises(polyspec.InputError, match="held_out"):
        read_sentences(DataConfig(str(tmp_path / "few.txt")))
