"""Models that say several codes a step against their own generate, on small random ones in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_frames import noisy, tiny_csm

import polyspec
from polyspec.modalities.speech.csm import CsmTarget

TEXTS = ["hello you", "a", "it is."]
KINDS = {"csm": tiny_csm}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("autoregressive", {}),
    "lookup": ("prompt_lookup", {"length": 1}),
    "lookup over frames": ("prompt_lookup", {"length": 6}),
    "lookup, adaptive": ("prompt_lookup", {"length": "adaptive"}),
    "draft model": ("speculative_sampling", {"length": 3}),
    "blocks": ("block_verification", {"length": 7}),
    "coupled": ("gumbel_coupled", {"length": 5}),
}


def pipe(kind: str, method: str = "plain", noise: float = 0.03, **sizes: Any) -> Any:
    target = KINDS[kind](**sizes)
    recipe, knobs = METHODS[method]
    needs = {"draft_model": noisy(target[0], noise)} if method in ("draft model", "blocks", "coupled") else {}
    made = polyspec.pipeline("speech", target=target, recipe=recipe, overrides={**knobs, **needs})
    made.speech.most = 10
    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "ragged"])
def test_greedy_codes_are_the_models_own(kind: str, method: str, texts: list[str]) -> None:
    p = pipe(kind, method)
    said, stats = p.tokens(texts, None, None, do_sample=False)
    assert said == p.speech.generate(texts, do_sample=False)
    assert len({c for row in said for c in row}) > 5
    assert method == "plain" or 0 < stats.acceptance_rate < 1


@pytest.mark.parametrize("method", ["lookup over frames", "coupled"])
def test_shared_noise_says_the_plain_loops_codes(kind: str, method: str) -> None:
    knobs: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 5}
    plain, _ = pipe(kind).tokens(TEXTS, [3, 4, 5], None, **knobs)
    p = pipe(kind, method)
    p.method = polyspec.recipe.Method(p.method.recipe, p.method.loop, p.method.drafter, p.method.length, "coupled")
    said, stats = p.tokens(TEXTS, [3, 4, 5], None, **knobs)
    assert said == plain and stats.acceptance_rate > 0
    assert pipe(kind).tokens(TEXTS[1:2], [4], None, **knobs)[0] == plain[1:2]
    assert pipe(kind).tokens(TEXTS, [6, 7, 8], None, **knobs)[0] != plain


@pytest.mark.parametrize("recipe", ["vadusa", "dflash", "speech_mtp"])
def test_what_takes_one_decoder_is_refused(kind: str, recipe: str) -> None:
    from recipe_needs import overrides
    from tiny_models import build

    found = next(r for r in polyspec.recipes("speech") if r.name == recipe)
    p = polyspec.pipeline("speech", target=KINDS[kind](), recipe=recipe, overrides=overrides(found, build("llama")))
    with pytest.raises(polyspec.PolyspecError, match=r"several codes|left early|trained for"):
        p(TEXTS[0])


def test_a_stream_gives_the_whole(kind: str) -> None:
    p = pipe(kind, "lookup over frames")
    whole = p(TEXTS[0], do_sample=False).outputs[0]
    assert whole.sample_rate == p.speech.sample_rate and whole.waveform.abs().max() > 0
    parts = list(p.stream(TEXTS[0], do_sample=False))
    assert torch.equal(torch.cat([a.waveform for a in parts], dim=1), whole.waveform)


def test_a_text_without_room_is_refused(kind: str) -> None:
    with pytest.raises(polyspec.InputError, match="shorter"):
        pipe(kind)("a" * 300)


# -- CSM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_csm_rows_end_where_their_own_generate_ends(method: str) -> None:
    p = pipe("csm", method, frame=2, codes=7)
    said, _ = p.tokens(TEXTS, None, None, do_sample=False)
    assert said == p.speech.generate(TEXTS, do_sample=False)
    assert len({len(row) for row in said}) > 1, "rows of different lengths"


class Forgetful(CsmTarget):
    """Leaves the depth decoder's cache as the rejected drafts made it."""

    def rollback(self, lengths: Any, running: Any = None) -> None:
        before = list(self.inner)
        super().rollback(lengths, running)
        self.inner = before


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "ragged"])
def test_a_depth_cache_that_is_not_rolled_back_is_noticed(texts: list[str]) -> None:
    p = pipe("csm", "lookup over frames")
    own = p.speech.generate(texts, do_sample=False)
    p.speech.target = Forgetful(p.model)
    assert p.tokens(texts, None, None, do_sample=False)[0] != own
