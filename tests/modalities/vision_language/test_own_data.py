"""Heads for a vision-language target: what it says of pictures, and its hidden states with them in sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import torch

import polyspec
from polyspec import ConfigError
from polyspec.modalities.vision_language.own_data import DataSource
from polyspec.training import compute_features, train

LAYERS = [1, 2]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        tiny_llava.picture(number).save(tmp_path / "pictures" / f"{number}.png")
    return {
        "pictures": str(tmp_path / "pictures"),
        "target": str(tiny_llava.save_llava(tmp_path / "llava")),
        "prompts": ["what is in the picture ?", "give keywords for the picture ."],
        "device": "cpu",
        "dtype": "float32",
    }


def test_rows_are_greedy_answers_and_states_are_the_models_own(settings: dict[str, Any], tmp_path: Path) -> None:
    source = DataSource(settings)
    source.pipe.model.generation_config.suppress_tokens = [3]  # a random model says placeholders of pictures, too
    knobs = {"tokens": 80, "batch": 4, "max_new_tokens": 9, "temperature": 0}
    corpus = source.corpus(tmp_path / "data", **knobs)
    features = compute_features(source.target, corpus, LAYERS, tmp_path / "features", batch=5, inputs=source.inputs)
    model, seen = source.pipe.model, 0
    for row in range(len(corpus)):
        question, pictures = source.asked(row)
        seen += len(pictures)
        given = source.pipe.encode([question], [pictures])
        prompt = given["input_ids"].shape[1]
        assert corpus.prompts[row] == prompt
        own = model.generate(**given, max_new_tokens=9, do_sample=False)[0]
        assert corpus.row(row).tolist() == own.tolist()
        whole = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask")}
        states = model(input_ids=own[None, :-1], output_hidden_states=True, **whole).hidden_states
        for layer, found in zip(LAYERS, features.row(row), strict=True):
            torch.testing.assert_close(found.float(), states[layer][0], rtol=2e-2, atol=2e-2)  # kept in bfloat16
    assert 0 < seen < len(corpus), "rows with and without a picture"
    # another picture is another answer's state: what the test above would not catch if pictures were mixed up
    swapped = compute_features(
        source.target, corpus, LAYERS, tmp_path / "swapped", batch=5,
        inputs=lambda rows: {k: v.flip(0) for k, v in source.inputs(rows).items()},
    )  # fmt: skip
    assert any((a - b).abs().max() > 0.1 for a, b in zip(features.row(0), swapped.row(0), strict=True))


def test_heads_are_trained_for_a_model_that_sees(settings: dict[str, Any], tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module

    given = [f"train.{k}={settings[k]}" for k in ("pictures", "target", "device", "dtype")]
    given += [f"train.output={tmp_path / 'heads'}", f"train.prompts={settings['prompts']}", "train.vocabulary=null"]
    given += ["train.data.tokens=60", "train.data.batch=4", "train.data.max_new_tokens=9", "train.data.temperature=0"]
    given += ["train.schedule.minutes=null", "+train.schedule.steps=3", "train.schedule.batch=2"]
    with initialize_config_module("polyspec.conf", version_base="1.3"):
        config = compose("config", ["task=train", "modality=vision_language", "train=medusa", *given]).train
    folder = train(config)
    fast = polyspec.pipeline(
        "vision_language", target=settings["target"], recipe="medusa", overrides={"heads": str(folder)}, dtype="float32"
    )
    picture = tiny_llava.picture(5)
    plain = polyspec.pipeline("vision_language", target=fast.loaded, recipe="autoregressive")
    knobs = {"max_new_tokens": 12, "do_sample": False}
    assert (
        fast("what is in the picture ?", picture, **knobs).outputs
        == plain("what is in the picture ?", picture, **knobs).outputs
    )


def test_without_pictures_there_is_nothing_to_ask_about(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train\.pictures"):
        DataSource({**settings, "pictures": None})
