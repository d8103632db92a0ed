"""The vision-language pipeline and its command: images in, answers out, one clear error for what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_llava import PLACEHOLDER, llava, picture, save_llava
from tiny_models import llama, sharpen

import polyspec
from polyspec.modalities.vision_language.images import images_of_prompts, open_image

QUESTION = "what is in the picture?"


def pipe(recipe: str = "prompt_lookup", **overrides: Any) -> Any:
    return polyspec.pipeline("vision_language", target=llava(), recipe=recipe, overrides=overrides)


def drafter() -> Any:
    torch.manual_seed(3)
    return sharpen(llama(vocab=len(llava()[1].tokenizer), hidden=16), 6.0).eval()


def test_answers_are_those_of_the_models_own_generate_for_one_several_and_no_images() -> None:
    model, processor = llava()
    given = {"max_new_tokens": 12, "do_sample": False}
    fast = pipe("speculative_sampling", draft_model=drafter(), length=3)
    for prompts, images in (
        ([QUESTION], picture()),
        ([QUESTION], [picture(1), picture(2, (30, 30))]),
        ([QUESTION, "give keywords", "a tree"], [picture(1), None, [picture(2), picture(3)]]),
    ):
        result = fast(prompts, images, **given)
        inputs = fast.encode(prompts, images_of_prompts(images, len(prompts)))
        ids = model.generate(**inputs, **given)[:, inputs["input_ids"].shape[1] :]
        assert result.outputs == processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert result.stats.guarantee == "exact"


def test_images_stand_where_the_prompt_has_placeholders_or_in_front() -> None:
    answer = pipe()(f"{PLACEHOLDER} {QUESTION}", picture(), max_new_tokens=8, do_sample=False).outputs
    assert answer == pipe()(QUESTION, picture(), max_new_tokens=8, do_sample=False).outputs


def test_a_captioner_sees_every_image_of_every_prompt() -> None:
    seen: list[Image.Image] = []

    def captioner(image: Image.Image) -> str:
        seen.append(image)
        return "a red heart"

    given = {"max_new_tokens": 8, "do_sample": False}
    images = [[picture(1)], [picture(2), picture(3)]]
    fast = pipe("tabed", draft_model=drafter(), captioner=captioner, length=3)
    assert fast([QUESTION] * 2, images, **given).outputs == pipe()([QUESTION] * 2, images, **given).outputs
    assert seen == [images[0][0], *images[1]]
    assert fast.tokenizer.decode(fast.caption(1, 1)) == "a red heart"


def test_transparent_pictures_are_laid_on_white() -> None:
    assert open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    text, cut, whole = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    text.write_text("no picture")
    picture(size=(80, 80)).save(whole)
    cut.write_bytes(whole.read_bytes()[:4000])
    for path, reason in ((text, "not an image"), (cut, "truncated"), (tmp_path / "d.png", "no image")):
        with pytest.raises(polyspec.InputError, match=reason):
            pipe()(QUESTION, path)
    with pytest.raises(polyspec.InputError, match="PIL image or a path"):
        pipe()(QUESTION, 3)


def test_placeholders_and_images_that_do_not_match_are_refused() -> None:
    for prompt, image in ((f"{PLACEHOLDER} {PLACEHOLDER} a", picture()), (f"{PLACEHOLDER} a", None)):
        with pytest.raises(polyspec.InputError, match="placeholders"):
            pipe()(prompt, image)
    with pytest.raises(polyspec.InputError, match="2 images or lists of images for 3 prompts"):
        pipe()([QUESTION] * 3, [picture(), picture()])


def test_bad_prompts_knobs_and_drafters_are_refused() -> None:
    with pytest.raises(polyspec.InputError, match="empty"):
        pipe()(" ", picture())
    with pytest.raises(polyspec.ConfigError, match="max_new_tokens"):
        pipe()(QUESTION, picture(), max_new_tokens=0)
    with pytest.raises(polyspec.InputError, match="tokenizer"):
        pipe("text_only_draft", draft_model=llama(vocab=5000))(QUESTION, picture())
    with pytest.raises(polyspec.ConfigError, match="atspeed_s"):
        pipe("atspeed_s")


def test_the_command_streams_an_answer_and_says_what_is_wrong(tmp_path: Path) -> None:
    target = save_llava(tmp_path / "llava")
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.png")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "polyspec", "modality=vision_language", f"target={target}", "dtype=float32"]
        command += [f"prompt={QUESTION}".replace("?", ""), "max_new_tokens=8", "device=cpu", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    done = run("image=[a.png,b.png]")
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    answer = pipe()(QUESTION.replace("?", ""), images, max_new_tokens=8).outputs[0]
    assert done.returncode == 0, done.stderr
    assert answer and done.stdout.split("recipe")[0].count(answer) == 1, "before the table, and once"
    assert "exact" in done.stdout
    missing = run("image=nothing.png")
    assert missing.returncode == 2 and missing.stderr.strip().splitlines() == [
        "polyspec: error: there is no image nothing.png; give the path of a picture"
    ]
