"""`polyspec.pipeline("recommendation")`: the lists are right, filters and shared IDs are respected, and nothing is silent."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from beam_search import beam_search, catalogue, same
from tiny_models import build, noisy_copy, target

import polyspec
from polyspec.drafting.dflash import DFlashModel
from polyspec.drafting.medusa import MedusaModel
from polyspec.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from polyspec.modalities.recommendation.items import FILE, Items

IDS = [3 * i + 1 for i in range(60)]
HISTORIES = [[1, 4, 7], [10], [13, 16, 19, 22, 25, 28], [178, 1]]
K = [10, 1, 20, 5]


@cache
def items() -> Items:
    tokens = catalogue()
    tokens[7] = tokens[3]  # two items with one ID
    return Items(IDS, tokens, [f"item {i}" for i in IDS], prefix=[2])


@cache
def pipe(recipe: str = "atspeed_s", noise: float = 0.2):
    overrides = {} if recipe == "autoregressive" else {"draft_model": noisy_copy(target("llama"), noise)}
    return polyspec.pipeline("recommendation", target=(target("llama"), items()), recipe=recipe, overrides=overrides)


def found(result):
    return [[(r.item_id, r.score) for r in row] for row in result.outputs]


def expected(histories=HISTORIES, k=K, allowed=None):
    """The list by definition, leaf by leaf, and the items that share each."""
    known, mask = items(), np.ones(60, bool) if allowed is None else allowed
    lists = []
    for history, count in zip(histories, k, strict=True):
        prompt = known.prompt(history, 250)
        row = []
        for tokens, score in beam_search(target("llama"), prompt, known.tokens[mask], count):
            row += [
                (i, score) for i, t, m in zip(IDS, known.tokens.tolist(), mask, strict=True) if m and tuple(t) == tokens
            ]
        lists.append(row[:count])
    return lists


@pytest.mark.parametrize("recipe", ["autoregressive", "atspeed_s"])
def test_a_batch_of_histories_of_any_length_and_k_gets_the_lists_of_beam_search(recipe):
    result = pipe(recipe)(HISTORIES, k=K)
    assert same(found(result), expected())
    assert result.stats.recipe == recipe and result.stats.guarantee == "exact"
    assert all(r.title == f"item {r.item_id}" for row in result.outputs for r in row)
    one = pipe(recipe)(HISTORIES[0], k=10)
    assert same(found(one), expected()[:1])


def test_drafts_save_target_calls():
    with_drafts, without = pipe()(HISTORIES, k=K).stats, pipe("autoregressive")(HISTORIES, k=K).stats
    assert with_drafts.target_calls < without.target_calls == 4
    assert with_drafts.draft_calls > 0 and with_drafts.tokens_per_call > without.tokens_per_call == 1


def test_more_beams_than_items_asked_for():
    result = pipe()(HISTORIES, k=3, beams=[3, 20, 60, 9])
    wide = expected(k=[3, 20, 60, 9])
    assert same(found(result), [row[:3] for row in wide])


def test_filters_are_a_row_s_own():
    allow = [IDS[:30], None, IDS[20:], None]
    deny = [[1], IDS[:59], None, None]
    with pytest.warns(UserWarning) as warned:
        result = pipe()(HISTORIES, k=40, allow=allow, deny=deny)
    assert [str(w.message).split(":")[0] for w in warned] == ["row 0", "row 1"]
    for row, (a, d) in enumerate(zip(allow, deny, strict=True)):
        may = set(IDS if a is None else a) - set(d or ())
        got = [r.item_id for r in result.outputs[row]]
        assert set(got) <= may and len(set(got)) == len(got) == min(40, len(may))


@pytest.mark.parametrize("recipe", ["autoregressive", "atspeed_s", "atspeed_r"])
def test_no_item_is_ever_invented_repeated_or_forbidden(recipe):
    rng = np.random.default_rng(0)
    for trial in range(10):
        histories = [rng.choice(IDS, rng.integers(1, 20)).tolist() for _ in range(6)]
        deny = [rng.choice(IDS, rng.integers(0, 50), replace=False).tolist() for _ in range(6)]
        k = rng.integers(1, 10, 6).tolist()
        result = pipe(recipe)(histories, k=k, deny=deny, seed=trial)
        for row, (gone, count) in enumerate(zip(deny, k, strict=True)):
            got = [r.item_id for r in result.outputs[row]]
            assert len(set(got)) == len(got) == count
            assert set(got) <= set(IDS) - set(gone)


def test_of_two_items_with_one_id_a_denied_one_is_left_out_and_the_other_stays():
    one, other = IDS[3], IDS[7]
    everything = pipe()(HISTORIES[0], k=60).outputs[0]
    assert {one, other} <= {r.item_id for r in everything}
    assert next(r.score for r in everything if r.item_id == one) == next(
        r.score for r in everything if r.item_id == other
    )
    without = [r.item_id for r in pipe()(HISTORIES[0], k=59, deny=[one]).outputs[0]]
    assert other in without and one not in without


def test_sampled_lists_follow_the_seed_whatever_drafts_and_whoever_else_is_in_the_batch():
    plain = pipe("autoregressive")(HISTORIES, k=K, do_sample=True, seed=5)
    drafted = pipe()(HISTORIES, k=K, do_sample=True, seed=5)
    assert same(found(plain), found(drafted))
    alone = pipe()(HISTORIES[2], k=20, do_sample=True, seed=7)
    assert same(found(alone), found(plain)[2:3])
    assert found(pipe()(HISTORIES, k=K, do_sample=True, seed=6)) != found(plain)


def test_numbers_from_numpy_will_do():
    result = pipe()(np.array(HISTORIES[0]), k=np.int64(10), deny=np.array([1]))
    assert same(found(result), found(pipe()(HISTORIES[0], k=10, deny=[1])))


def test_the_relaxed_recipe_is_fixed_by_its_seed():
    one, two, other = (found(pipe("atspeed_r")(HISTORIES, k=K, seed=s)) for s in (1, 1, 2))
    assert one == two != other


def test_the_catalogue_may_change_between_calls():
    own = polyspec.pipeline("recommendation", target=(target("llama"), items()))
    best = own(HISTORIES[0], k=3).outputs[0]
    own.items = own.items.without([best[0].item_id])
    after = own(HISTORIES[1], k=59).outputs[0]
    assert best[0].item_id not in {r.item_id for r in after} and len(after) == 59
    own.items = own.items.with_items([9999], [[2, 14, 26, 38]], ["new"])
    assert "new" in {r.title for r in own(HISTORIES[1], k=60).outputs[0]}


def test_a_folder_is_all_it_takes(tmp_path: Path):
    target("llama").save_pretrained(tmp_path)
    items().save(tmp_path)
    plain = polyspec.pipeline("recommendation", target=tmp_path, device="cpu", dtype="float32")
    assert plain.method.recipe.name == "autoregressive"
    noisy_copy(target("llama"), 0.2).save_pretrained(tmp_path / "draft")
    drafting = polyspec.pipeline("recommendation", target=str(tmp_path), device="cpu", dtype="float32")
    assert drafting.method.recipe.name == "atspeed_s"
    assert same(found(plain(HISTORIES, k=K)), expected()) and same(found(drafting(HISTORIES, k=K)), expected())
    relaxed = polyspec.pipeline("recommendation", target=tmp_path, device="cpu", dtype="float32", recipe="atspeed_r")
    assert relaxed(HISTORIES, seed=0).stats.guarantee == "heuristic"
    again = polyspec.pipeline("recommendation", target=tmp_path, device="cpu", dtype="float32", recipe="autoregressive")
    assert again(HISTORIES).stats.draft_calls == 0


@pytest.mark.parametrize("kind", [MedusaModel, DFlashModel])
def test_heads_on_the_target_draft_without_a_second_model(kind, tmp_path: Path):
    kind.for_target(target("llama"), **({"heads": 3} if kind is MedusaModel else {"block": 5})).save_pretrained(
        tmp_path
    )
    known = (target("llama"), items())
    drafting = polyspec.pipeline("recommendation", target=known, overrides={"heads": str(tmp_path), "spread": 4})
    assert drafting.method.recipe.name == "atspeed_s"
    result = drafting(HISTORIES, k=K)
    assert same(found(result), expected())
    assert result.stats.draft_calls == 1
    with pytest.raises(CheckpointError, match="trained for"):
        polyspec.pipeline(
            "recommendation", target=(build("llama", vocab=70), items()), overrides={"heads": str(tmp_path)}
        )


def test_histories_longer_than_the_context_lose_their_oldest_items():
    long = [IDS[i % 60] for i in range(300)]
    assert same(found(pipe()(long, k=5)), found(pipe()(long[-62:], k=5)))


def test_bfloat16_lists_hold_known_items_too():
    half = build("llama").to(torch.bfloat16)
    drafting = polyspec.pipeline(
        "recommendation", target=(half, items()), recipe="atspeed_s", overrides={"draft_model": noisy_copy(half, 0.2)}
    )
    assert all(r.item_id in IDS for row in drafting(HISTORIES, k=10).outputs for r in row)


LLAMA = "llama"
WRONG = {
    "an empty history": (lambda: pipe()([]), InputError, "history is empty"),
    "an empty history in a batch": (lambda: pipe()([[1], []]), InputError, "history is empty"),
    "an unknown item": (lambda: pipe()([1, 2]), InputError, "not known: 2"),
    "a title for an item": (lambda: pipe()(["item 1"]), InputError, "whole numbers"),
    "text for a history": (lambda: pipe()("1, 4"), InputError, "list of item ids"),
    "a number for a history": (lambda: pipe()(1), InputError, "list of item ids"),
    "a history and an item": (lambda: pipe()([[1], 4]), InputError, "not both"),
    "k = 0": (lambda: pipe()([1], k=0), ConfigError, "k must be"),
    "half a k": (lambda: pipe()([1], k=[2.5]), ConfigError, "k must be"),
    "a k that is no number": (lambda: pipe()([1], k=None), ConfigError, "k must be"),
    "a k in words": (lambda: pipe()([1], k="5"), ConfigError, "k must be"),
    "beams that are no number": (lambda: pipe()([1], k=2, beams=2.5), ConfigError, "beams must be"),
    "no history": (lambda: pipe()(None), InputError, "list of item ids"),
    "histories in histories": (lambda: pipe()([[1], [[4]]]), InputError, "whole numbers"),
    "a seed in words": (lambda: pipe()([1], seed="a"), ConfigError, "seed"),
    "a filter in a filter": (lambda: pipe()([1], deny=[[[4]]]), InputError, "whole numbers"),
    "more than there are": (lambda: pipe()([1], k=61), InputError, "60 items there are"),
    "a billion": (lambda: pipe()([1], k=10**9), InputError, "60 items there are"),
    "k for other rows": (lambda: pipe()([[1], [4]], k=[3]), ConfigError, "1 entries for 2"),
    "fewer beams than k": (lambda: pipe()([1], k=5, beams=4), ConfigError, "beams must lie"),
    "far too many beams": (lambda: pipe()([1], k=5, beams=10**6), ConfigError, "beams must lie"),
    "everything denied": (lambda: pipe()([1], deny=IDS), InputError, "leave no item"),
    "nothing allowed": (lambda: pipe()([1], allow=[]), InputError, "leave no item"),
    "an unknown item denied": (lambda: pipe()([1], deny=[2]), InputError, "not known: 2"),
    "a word denied": (lambda: pipe()([1], deny="1"), InputError, "deny must hold"),
    "filters for other rows": (lambda: pipe()([[1], [4]], deny=[[1]]), InputError, "1 sets for 2"),
    "seeds for other rows": (lambda: pipe()([[1], [4]], seed=[1]), ConfigError, "seed has 1"),
    "a target without items": (
        lambda: polyspec.pipeline("recommendation", target=(target(LLAMA), [1, 2])),
        ConfigError,
        "Items",
    ),
    "items beyond the vocabulary": (
        lambda: polyspec.pipeline("recommendation", target=(build(LLAMA, vocab=20), items())),
        CheckpointError,
        "knows 0 … 19",
    ),
    "drafts without a drafter": (
        lambda: polyspec.pipeline("recommendation", target=(target(LLAMA), items()), recipe="atspeed_s"),
        ConfigError,
        "draft_model",
    ),
    "two drafters": (
        lambda: polyspec.pipeline(
            "recommendation", target=(target(LLAMA), items()), overrides={"draft_model": target(LLAMA), "heads": "x"}
        ),
        ConfigError,
        "one of them",
    ),
    "another modality's recipe": (
        lambda: polyspec.pipeline("recommendation", target=(target(LLAMA), items()), recipe="sjd"),
        ConfigError,
        "atspeed_s",
    ),
    "an unknown knob": (
        lambda: polyspec.pipeline(
            "recommendation", target=(target(LLAMA), items()), recipe="atspeed_s", overrides={"N": 3}
        ),
        ConfigError,
        "knob",
    ),
    "an encoder-decoder": (
        lambda: polyspec.pipeline("recommendation", target=(target("t5"), items())),
        UnsupportedModelError,
        "decoder-only",
    ),
    "an empty folder": (lambda: polyspec.pipeline("recommendation", target="/nowhere/at/all"), CheckpointError, FILE),
    "a list recipe for text": (lambda: polyspec.custom_generate("atspeed_s"), ConfigError, "recommendation"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_clear_error(case):
    attempt, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        attempt()


def test_recipes_for_lists_are_for_recommendation_only():
    assert {r.name for r in polyspec.recipes("recommendation")} >= {"autoregressive", "atspeed_s", "atspeed_r"}
    assert not {"atspeed_s", "atspeed_r"} & {r.name for m in ("text", "image") for r in polyspec.recipes(m)}
