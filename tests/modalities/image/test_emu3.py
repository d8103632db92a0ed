"""The Emu3 adapter against the model's own generate, on a small random model in float32: guidance, forced ends of lines
and frame, ragged batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_needs import discrete_recipes, head_class_of
from tiny_emu3 import CODES, EOF, EOI, EOL, EOS, HEIGHT, NAMES, SIZE, WIDTH, own_tokens, tiny_emu3
from torch import Tensor

import polyspec
from polyspec.modalities.image import codebook
from polyspec.modalities.image.evaluate import call_seconds, transformers_generate
from polyspec.modalities.image.target import Emu3Target, make_image_target

PROMPTS = ["red heart", "star", "blue blue car"]
NEGATIVE = "lowres blurry"
EXACT = [r.name for r in discrete_recipes("image") if r.guarantee == "exact" and not r.needs]
HEADS = ["dflash", "eagle", "eagle2", "medusa"]


@pytest.fixture(autouse=True)
def known_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Emu3Target, "negative_prompt", NEGATIVE)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The tokens of every run, in the model's ids."""
    found: list[Tensor] = []
    draw = Emu3Target.pictures

    def pictures(self: Emu3Target, processor: Any, tokens: Tensor) -> Any:
        found.append(self.ids[tokens])
        return draw(self, processor, tokens)

    monkeypatch.setattr(Emu3Target, "pictures", pictures)
    yield found


def pipeline(recipe: str, **overrides: Any) -> Any:
    if recipe in (*HEADS, "lantern", "lantern_pp"):
        kind = head_class_of(next(r for r in polyspec.recipes("image") if r.name == recipe))
        overrides["heads"] = kind.for_target(make_image_target(tiny_emu3()[0], 1.0))
    return polyspec.pipeline("image", target=tiny_emu3(), recipe=recipe, overrides=overrides)


@pytest.mark.parametrize("recipe", [*EXACT, *HEADS])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "ragged"])
def test_greedy_tokens_are_the_models_own(
    recipe: str, guidance_scale: float, prompts: list[str], drawn: list[Tensor]
) -> None:
    result = pipeline(recipe)(prompts, size=SIZE, do_sample=False, guidance_scale=guidance_scale)
    assert torch.equal(drawn[0], own_tokens(prompts, guidance_scale, NEGATIVE))
    assert result.stats.new_tokens == len(prompts) * (HEIGHT * (WIDTH + 1) + 3)


def test_pictures_are_what_the_processor_makes_of_the_models_tokens() -> None:
    model, processor = tiny_emu3()
    tokens = own_tokens(PROMPTS, 3.0, NEGATIVE)
    pixels = model.decode_image_tokens(image_tokens=tokens, height=HEIGHT, width=WIDTH)
    expected = processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")["pixel_values"]
    pictures = pipeline("sjd")(PROMPTS, size=SIZE, do_sample=False, guidance_scale=3.0).outputs
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in expected]


@pytest.mark.parametrize(
    "recipe", ["autoregressive", "scd_gs", "sjd_pac", "gumbel_jacobi", "gsd", *HEADS, "lantern_pp"]
)
@pytest.mark.parametrize("knobs", [{}, {"top_k": 3}, {"top_p": 0.5, "temperature": 2.0}], ids=str)
def test_sampling_never_breaks_a_line(recipe: str, knobs: dict[str, Any], drawn: list[Tensor]) -> None:
    pipe = pipeline(recipe)
    for seed in range(3):
        pipe(PROMPTS, size=SIZE, seed=seed, do_sample=True, guidance_scale=2.0, **knobs)
    codes = torch.tensor(tiny_emu3()[0].vocabulary_mapping.image_tokens)
    for tokens in drawn:
        lines = tokens[:, :-3].view(-1, HEIGHT, WIDTH + 1)
        assert bool(torch.isin(lines[..., :-1], codes).all()) and bool((lines[..., -1] == EOL).all())
        assert tokens[:, -3:].tolist() == [[EOF, EOI, EOS]] * len(PROMPTS)
    assert len({str(t.tolist()) for t in drawn}) == 3


@pytest.mark.parametrize("recipe", ["gumbel_jacobi", "jacobi"])
@pytest.mark.parametrize("init", ["left", "above", "random"])
def test_shared_noise_draws_the_plain_loops_tokens(recipe: str, init: str, drawn: list[Tensor]) -> None:
    knobs = {"size": SIZE, "seed": 5, "do_sample": True, "temperature": 1.3, "top_k": 9, "images_per_prompt": 2}
    pipeline("autoregressive")(PROMPTS, **knobs)
    pipeline(recipe, init=init)(PROMPTS, **knobs)
    assert torch.equal(*drawn)


def test_forced_tokens_are_drafted_and_accepted(drawn: list[Tensor]) -> None:
    """With nothing but forced tokens left, one call takes them all."""
    result = pipeline("eagle", length=8)(PROMPTS[0], size=(8, 8), do_sample=True, seed=0)
    # one code, then end of line, frame, image and text, of which a head that has learnt nothing drafts the last four
    assert drawn[0][0, 1:].tolist() == [EOL, EOF, EOI, EOS]
    assert result.stats.target_calls <= 2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_baseline_of_benchmarks_is_the_models_own_generate(guidance_scale: float) -> None:
    target = make_image_target(tiny_emu3()[0], guidance_scale)
    tokens = target.generate(tiny_emu3()[1], PROMPTS, SIZE, do_sample=False)
    assert torch.equal(target.ids[tokens], own_tokens(PROMPTS, guidance_scale, NEGATIVE))
    pipe = pipeline("sjd")
    arguments = {"size": SIZE, "do_sample": False, "guidance_scale": guidance_scale}
    assert transformers_generate(pipe, PROMPTS, **arguments) == tokens.numel()
    assert call_seconds(pipe, PROMPTS, [1, 4], **arguments)[4] > 0


def test_a_row_is_a_line_of_codes_and_its_end() -> None:
    target = make_image_target(tiny_emu3()[0], 1.0)
    target.encode(tiny_emu3()[1], PROMPTS, SIZE)
    assert target.row_width == WIDTH + 1 and target.image_tokens == HEIGHT * (WIDTH + 1) + 3


def test_neighbours_of_a_code_are_codes_by_their_place_in_the_codebook() -> None:
    target = make_image_target(tiny_emu3()[0], 1.0)
    codes = target.model.model.vqmodel.quantize.embedding.weight
    assert target.codebook.shape == (CODES + 4, codes.shape[1]) and torch.equal(target.codebook[:CODES], codes)
    nearest = torch.cdist(codes, codes).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(target.neighbours[:CODES, 0], nearest)
    assert bool((target.neighbours[CODES:] == torch.arange(CODES, CODES + 4)[:, None]).all())
    assert [NAMES[i] for i in target.ids[:CODES].tolist()] == [f"<|visual token {c:06d}|>" for c in range(CODES)]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"size": (20, 32)}, "multiples of 8"),
        ({"size": (0, 32)}, "size must be height and width"),
        ({"size": 32}, "size must be height and width"),
        ({"size": "32"}, "size must be height and width"),
        ({"size": (80, 80)}, "shorten the prompt or draw a smaller picture"),
        ({}, "shorten the prompt or draw a smaller picture"),  # 720×720 by default
        ({"size": SIZE, "prompt": " ".join(["red"] * 90)}, "shorten the prompt"),
    ],
)
def test_bad_requests_are_refused_before_the_model_runs(arguments: dict[str, Any], fragment: str) -> None:
    model, pipe, calls = tiny_emu3()[0], pipeline("sjd"), []
    handle = model.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(polyspec.PolyspecError, match=fragment):
            pipe(**{"prompt": "red", **arguments})
    finally:
        handle.remove()
    assert not calls


def test_a_checkpoint_is_loaded_by_its_type(tmp_path: Path, drawn: list[Tensor]) -> None:
    for part in tiny_emu3():
        part.save_pretrained(tmp_path)
    pipe = polyspec.pipeline("image", target=str(tmp_path), recipe="scd_gs", device="cpu", dtype="float32")
    assert pipe.settings() == {
        "do_sample": False,
        "temperature": None,
        "top_k": 2048,
        "top_p": None,
        "guidance_scale": 3.0,
    }
    pipe(PROMPTS[0], size=list(SIZE))
    assert torch.equal(drawn[0], own_tokens(PROMPTS[:1], 3.0, NEGATIVE))


@pytest.mark.parametrize("lost", ["<|extra_200|>", "<|visual token 000003|>", None])
def test_a_vocabulary_map_that_lacks_tokens_is_refused(lost: str | None, tmp_path: Path) -> None:
    model, processor = tiny_emu3()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    config.vocabulary_map = {k: v for k, v in config.vocabulary_map.items() if k != lost} if lost else {}
    config.save_pretrained(tmp_path)
    with pytest.raises(polyspec.CheckpointError, match="vocabulary_map"):
        polyspec.pipeline("image", target=str(tmp_path), dtype="float32")


def test_a_neighbour_table_of_another_codebook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "QUICK", 4)
    model, processor = tiny_emu3()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    def neighbours() -> Tensor:
        pipe = polyspec.pipeline("image", target=str(tmp_path), device="cpu", dtype="float32")
        return make_image_target(pipe.model, 1.0).neighbours

    first = neighbours()
    assert (tmp_path / codebook.FILE).exists() and torch.equal(neighbours(), first)
    codebook.write_table(tmp_path / codebook.FILE, torch.zeros(CODES + 1, 2), torch.zeros(CODES + 1, CODES))
    with pytest.raises(polyspec.CheckpointError, match="made for another codebook"):
        neighbours()
    (tmp_path / codebook.FILE).write_bytes(b"no table")
    with pytest.raises(polyspec.CheckpointError, match="delete it"):
        neighbours()


def test_plain_generate_takes_a_recipe_with_transformers_own_constraint() -> None:
    """Without the pipeline: slower, because a constraint that is a function of the prefix is asked prefix by prefix."""
    plain = own_tokens(PROMPTS, 3.0, NEGATIVE)
    fast = polyspec.custom_generate("sjd", window=6)
    assert torch.equal(own_tokens(PROMPTS, 3.0, NEGATIVE, custom_generate=fast), plain)
    assert fast.stats.target_calls < plain.shape[1]
