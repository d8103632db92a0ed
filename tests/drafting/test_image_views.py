"""What drafters of vision-language models are told, and how an ensemble weighs its drafts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import llama, sharpen
from tiny_vlms import END, IMAGE, ROWS, START, VOCAB, prompt, target

import polyspec
from polyspec.drafting.ibed import Ibed
from polyspec.drafting.image_views import (
    ImageAdapter,
    ImageAdapterConfig,
    adapted,
    captioned,
    dropped,
    mark_images,
    view_prompts,
)
from polyspec.drafting.tabed import Tabed, grid


def drafter(vocab: int = VOCAB, hidden: int = 16) -> Any:
    torch.manual_seed(3)
    return sharpen(llama(vocab=vocab, hidden=hidden), 6.0).eval()


def adapter(output: int = 16, features: int = 32) -> ImageAdapter:
    torch.manual_seed(4)
    config = ImageAdapterConfig(feature_size=features, hidden_size=24, output_size=output)
    return ImageAdapter(config).eval()


def views_of(*views: Any) -> tuple[Any, Any, Any, torch.Tensor]:
    """The prompts of a row with one image and of one with two, in every view; and the image features."""
    given = prompt("llava", ROWS[:2])
    features = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    history = [row[mask].tolist() for row, mask in zip(given["input_ids"], given["attention_mask"].bool(), strict=True)]
    sequences: Any = SimpleNamespace(history=history, device=torch.device("cpu"))
    seen: Any = SimpleNamespace(model=target("llava"), given=SimpleNamespace(features=features, image_sizes=(4, 4, 4)))
    return *view_prompts(seen, sequences, drafter(), views), features


def test_dropped_images_leave_the_text_and_captions_stand_in_their_place() -> None:
    tokens, mask, extra, _ = views_of(dropped, captioned(lambda row, image: [40 + row, 50 + image]))
    rows = [t[m.bool()].tolist() for t, m in zip(tokens, mask, strict=True)]
    assert not extra and not any(IMAGE in row for row in rows)
    assert rows[0][5:7] == [START, END] and rows[2][5:9] == [START, 40, 50, END]
    assert rows[3][3:11] == [START, 41, 50, END, START, 41, 51, END]


def test_adapted_features_stand_where_their_own_image_was() -> None:
    _, mask, extra, features = views_of(adapted(adapter()), adapted(adapter(), pool=3))
    embeds, wanted = extra["inputs_embeds"], adapter()(features)
    last = [embeds[i][mask[i].bool()] for i in range(4)]
    assert torch.allclose(last[0][6:10], wanted[:4]) and torch.allclose(last[1][4:8], wanted[4:8])
    assert torch.allclose(last[1][10:14], wanted[8:])
    pooled = adapter()(torch.stack([features[8:11].mean(0), features[11]]))
    assert torch.allclose(last[3][8:10], pooled), "of the second image: three features in one, and the rest"


def test_the_grid_holds_every_weighting_in_tenths_once_equal_ones_first() -> None:
    for count, points in ((1, 1), (2, 11), (3, 66), (4, 286)):
        found = grid(count)
        assert found.shape == (points, count) and len(found.unique(dim=0)) == points
        assert torch.allclose(found.sum(1), torch.ones(points))
    assert grid(2)[0].tolist() == [0.5, 0.5]


def test_weights_go_to_the_draft_that_agrees_with_the_target() -> None:
    """Two drafts, of which one is always right: as soon as that shows, the mixture proposes what it says."""
    tabed = Tabed(drafter(), captioner=lambda row, image: [5], views="TC")
    tabed.weights, tabed.grid, tabed.drafted = torch.full((2, 2), 0.5), grid(2), []
    tabed.agreed, tabed.started = torch.zeros(2, len(tabed.grid)), [3, 3]
    right, wrong = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.05, 0.05, 0.9])
    for _ in range(2):
        tabed.mix(torch.stack([right, wrong, wrong, right]).log()[:, None])  # row 0: T is right; row 1: C
    tokens = torch.tensor([[9, 9, 9, 0, 0, 9], [9, 9, 9, 0, 0, 9]])
    tabed.context = SimpleNamespace(  # type: ignore[assignment]
        sequences=SimpleNamespace(tokens=tokens, limit=5, length_tensor=torch.tensor([5, 5]), device=tokens.device)
    )
    tabed.adapt()
    assert tabed.weights[0, 0] > 0.5 > tabed.weights[0, 1] and tabed.weights[1, 1] > 0.5
    assert bool((torch.einsum("bk,bkv->bv", tabed.weights, torch.stack([torch.stack([right, wrong]),
        torch.stack([wrong, right])])).argmax(-1) == 0).all())  # fmt: skip
    assert not tabed.drafted, "what was counted is not counted again"


def test_a_drafter_that_knows_the_answer_is_always_accepted_in_any_ensemble() -> None:
    """The target's own language model, told the image's features as they are, drafts what the target says."""
    model, given = target("llava"), prompt("llava", ROWS)
    small = llama(vocab=VOCAB)
    small.model.load_state_dict(model.model.language_model.state_dict())
    small.lm_head.load_state_dict(model.lm_head.state_dict())
    same = adapter(32)
    same.forward = lambda features: features  # type: ignore[method-assign]
    expected = model.generate(**given, do_sample=False, max_new_tokens=20)
    for recipe, views in (("ibed", "M"), ("tabed", "M"), ("text_only_draft", None)):
        knobs = {"views": views} if views else {}
        fast = polyspec.custom_generate(recipe, draft_model=small.eval(), image_adapter=same, length=4, **knobs)
        got = model.generate(**given, do_sample=False, max_new_tokens=20, custom_generate=fast)
        assert torch.equal(got, expected)
        assert fast.stats.acceptance_rate > 0.9, recipe
        assert fast.stats.mbsu < fast.stats.tokens_per_call and fast.stats.token_rate > 0


@pytest.mark.parametrize("recipe", ["ibed", "tabed"])
def test_views_that_cannot_be_made_are_refused(recipe: str) -> None:
    for views, lacking in (("M", "image_adapter"), ("TP", "image_adapter"), ("C", "captioner")):
        with pytest.raises(polyspec.ConfigError, match=lacking):
            polyspec.custom_generate(recipe, draft_model=drafter(), views=views)
    for views in ("X", "", "TT"):
        with pytest.raises(polyspec.ConfigError, match="MTCP"):
            polyspec.custom_generate(recipe, draft_model=drafter(), views=views)
    assert Ibed(drafter()).kinds == "T" and Ibed(drafter(), adapter(), lambda *_: [5]).kinds == "MTCP"


def test_an_adapter_for_another_drafter_is_refused_before_the_target_runs(tmp_path: Path) -> None:
    adapter(24).save_pretrained(tmp_path)
    for recipe in ("text_only_draft", "ibed"):
        fast = polyspec.custom_generate(recipe, draft_model=drafter(), image_adapter=tmp_path)
        with pytest.raises(polyspec.InputError, match="24"):
            target("llava").generate(**prompt("llava", ROWS), max_new_tokens=4, custom_generate=fast)
    with pytest.raises(polyspec.CheckpointError):
        polyspec.custom_generate("text_only_draft", draft_model=drafter(), image_adapter=tmp_path / "nothing")


def test_images_with_no_text_between_them_are_told_apart() -> None:
    row = [7, *[IMAGE] * 8, 5, *[IMAGE] * 2, 6, *[IMAGE] * 2, 9]
    found = mark_images(row, IMAGE, (IMAGE,), (3, 4, 4, 4), 3)
    assert found == [[7], (3, 7), (7, 11), [5], (11, 13), [6], (13, 15), [9]]
