"""Training of the sample's vision tower: from pictures with titles to a folder that the pipeline loads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_llava import picture, save_language
from transformers import AutoConfig, AutoProcessor, LlamaConfig, LlavaForConditionalGeneration

import polyspec
from polyspec.modalities.vision_language import sample
from polyspec.modalities.vision_language.evaluate import Example, match
from polyspec.modalities.vision_language.train import EyesSize, train
from polyspec.modalities.vision_language.train.data import augmented, read_examples, tidy
from polyspec.modalities.vision_language.train.words import WordEyes

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20)}


def png(colour: tuple[int, int, int]) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return {"bytes": file.getvalue()}


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [
        {"image": png(rgb), "title": f"{name} heart", "keywords": f"{name}, heart", "split": split}
        for split, copies in (("train", 4), ("test", 1))
        for name, rgb in COLOURS.items()
        for _ in range(copies)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "pictures.parquet")
    return str(tmp_path / "pictures.parquet")


def settings(data: str, folder: Path, steps: int) -> Any:
    conf = Path(sample.__file__).parents[2] / "conf" / "train" / "vision_language.yaml"
    config = OmegaConf.create({"train": OmegaConf.load(conf)}).train
    changes = {
        "output": str(folder / "out"), "device": "cpu", "dtype": "float32", "language": str(folder / "language"),
        "data": {"paths": [data]}, "minutes": None, "word_minutes": None, "measure": 3,
        "size": {"image_size": 32, "width": 16, "layers": 1, "heads": 2},
        "words": {"steps": 60, "batch": 6, "learning_rate": 1e-2, "warmup": 1, "seed": 0},
        "schedule": {"steps": steps, "batch": 3, "learning_rate": 1e-2, "warmup": 1, "seed": 0},
    }  # fmt: skip
    return OmegaConf.merge(config, changes)


def test_training_continues_where_it_stopped_and_leaves_a_target(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_language(tmp_path / "language")
    train(settings(data, tmp_path, 12))
    before = json.loads((tmp_path / "out" / "stages" / "captions" / "training.json").read_text())
    report = train(settings(data, tmp_path, 100))
    after = json.loads((tmp_path / "out" / "stages" / "captions" / "training.json").read_text())
    assert (before["steps"], after["steps"]) == (12, 100) and after["seconds"] > before["seconds"]
    assert after["loss"] < 0.75 * before["loss"], "the frozen model's answers follow the picture's caption"
    assert set(report["test"]) == {"with_image", "without_image"}
    monkeypatch.setattr(sample, "fetch_sample", lambda: tmp_path / "language")
    monkeypatch.setenv("POLYSPEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    pipe = polyspec.pipeline("vision_language", target=str(tmp_path / "out"), device="cpu", dtype="float32")
    images = [e.image for e in read_examples([data], "test")]
    whole = sample.assembled_folder(tmp_path / "out")
    model, processor = LlavaForConditionalGeneration.from_pretrained(whole), AutoProcessor.from_pretrained(whole)
    plain = polyspec.pipeline("vision_language", target=(model.float().eval(), processor), recipe="autoregressive")
    answers = pipe(["What is in the picture?"] * 3, images, max_new_tokens=8, do_sample=False)
    again = plain(["What is in the picture?"] * 3, images, max_new_tokens=8, do_sample=False)
    assert again.outputs == answers.outputs, "plain transformers loads the assembled folder"
    assert sample.assembled_folder(tmp_path / "out") == whole
    assert (
        len(answers.outputs) == 3
        and answers.outputs != pipe(["What is in the picture?"] * 3, max_new_tokens=8, do_sample=False).outputs
    )


def test_the_assembled_model_sees_what_was_trained(tmp_path: Path) -> None:
    save_language(tmp_path / "language")
    text = AutoConfig.from_pretrained(tmp_path / "language")
    eyes = sample.Eyes(EyesSize(32, 16, 1, 2).config(text, 3)).eval()
    eyes.save_pretrained(tmp_path / "eyes")
    model, processor = sample.assemble(eyes, tmp_path / "language", torch.float32)
    inputs = processor(text=sample.PLACEHOLDER + " a", images=picture(), return_tensors="pt")
    with torch.no_grad():
        wanted = eyes(inputs["pixel_values"])
        seen = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert torch.equal(torch.stack(list(seen)), wanted) and wanted.shape == (1, 4, 32)
    again = sample.Eyes.from_pretrained(tmp_path / "eyes")
    assert all(torch.equal(a, b) for a, b in zip(eyes.state_dict().values(), again.state_dict().values(), strict=True))
    assert sample.is_sample(tmp_path / "eyes") and not sample.is_sample(tmp_path / "language")


def test_matches_are_of_whole_words() -> None:
    example = Example(picture(), "red heart", ("love",))
    assert match("It is a Red Heart.", example) == (True, True)
    assert match("a heart", example) == (False, True) and match("love!", example) == (False, True)
    assert match("hearts and reds", example) == (False, False)


def test_missing_and_unfit_data_and_towers_are_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(polyspec.CheckpointError, match="nothing"):
        read_examples([str(tmp_path / "nothing.parquet")], "train")
    with pytest.raises(polyspec.ConfigError, match="split 'valid'"):
        read_examples([data], "valid")
    with pytest.raises(polyspec.CheckpointError, match="vision tower"):
        sample.load_sample(folder=tmp_path)


def test_names_are_tidied_and_a_collections_title_names_nothing(tmp_path: Path) -> None:
    assert [tidy(t) for t in ("Trumpet_B (B and W)", "arrow-right-red 3", "Clipart by Nicu Buculei - head1")] == [
        "Trumpet B", "arrow right red", "head",
    ]  # fmt: skip
    rows = [{"image": png((9, 9, 9)), "title": "Road Signs", "keywords": "hash, sign", "split": "train"}] * 12
    pandas.DataFrame(rows).to_parquet(tmp_path / "series.parquet")
    found = read_examples([str(tmp_path / "series.parquet")], "train", alike=5)
    assert len(found) == 5 and found[0].title == "" and found[0].keywords == ("sign",)


def test_a_word_is_near_the_picture_whose_token_says_it() -> None:
    """The likeliest word of a picture is the one whose embedding a token points at, whatever the others say."""
    table = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    model = WordEyes(EyesSize(32, 16, 1, 2).config(LlamaConfig(hidden_size=32), 3), table).eval()
    said = table.mean(0) + torch.stack([model.table[3], model.table[1], model.table[1], model.table[1]])
    model.eyes.forward = lambda pixels: said[None]  # type: ignore[method-assign]
    logits, _ = model(torch.zeros(1, 3, 32, 32))
    assert set(logits[0].topk(2).indices.tolist()) == {1, 3}


def test_an_augmented_picture_keeps_its_white_ground() -> None:
    torch.manual_seed(0)
    white = torch.ones(8, 3, 32, 32)
    dot = white.clone()
    dot[:, :, 12:20, 12:20] = -1
    assert torch.equal(augmented(white), white)
    moved = augmented(dot)
    assert moved.shape == dot.shape and moved.min() >= -1 and (moved < 0).flatten(1).any(1).all()
    assert not torch.equal(moved[0], moved[1])
