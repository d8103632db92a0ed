"""Models that say several codes a step against their own generate, on small random ones in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gtest import g_test
from tiny_frames import noisy, tiny_csm, tiny_dia, tiny_higgs
from torch import Tensor
from transformers import LogitsProcessor

import polyspec
from polyspec.decoding.sequences import Sequences
from polyspec.modalities.speech.csm import CsmTarget
from polyspec.modalities.speech.dia import Channels, guide
from polyspec.modalities.speech.frames import force, said_with
from polyspec.modalities.speech.higgs import Delays, Repetitions

TEXTS = ["hello you", "a", "it is."]
KINDS: dict[str, Any] = {
    "csm": tiny_csm,
    "higgs": tiny_higgs,
    "dia": tiny_dia,
    "dia, not guided": lambda: tiny_dia(None),
}
MOST = {"csm": 10, "higgs": 24, "dia": 20, "dia, not guided": 20}
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
    made.speech.most = MOST[kind]
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
    assert stats.acceptance_rate < 1 and (stats.acceptance_rate > 0 or method == "plain" or "lookup" in method)


@pytest.mark.parametrize("method", ["lookup over frames", "coupled"])
def test_shared_noise_says_the_plain_loops_codes(kind: str, method: str) -> None:
    knobs: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 5}
    plain, _ = pipe(kind).tokens(TEXTS, [3, 4, 5], None, **knobs)
    p = pipe(kind, method)
    p.method = polyspec.recipe.Method(p.method.recipe, p.method.loop, p.method.drafter, p.method.length, "coupled")
    said, stats = p.tokens(TEXTS, [3, 4, 5], None, **knobs)
    assert said == plain and stats.proposed_tokens > 0
    assert pipe(kind).tokens(TEXTS[2:], [5], None, **knobs)[0] == plain[2:]
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


@pytest.mark.parametrize("kind", ["csm", "higgs"])  # Dia's generate has no place for a callable
def test_their_own_generate_names_what_to_use_instead(kind: str) -> None:
    speech = pipe(kind).speech
    fast = polyspec.custom_generate("prompt_lookup")
    with pytest.raises(polyspec.UnsupportedModelError, match="pipeline"):
        speech.model.generate(**speech.inputs(["a"]), max_new_tokens=4, do_sample=False, custom_generate=fast)


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


# -- Higgs Audio v2 ----------------------------------------------------------------------------------------------------


class Stateful(LogitsProcessor):
    """transformers' own processor called for every drafted column; restore: from its state before them."""

    def __init__(self, model: Any, restore: bool):
        self.model, self.restore, self.history = model, restore, {}
        self.inner: Any = model._get_logits_processor(model.generation_config)[0]

    def over_drafts(self, scores: Tensor, sequences: Any, drafts: Tensor, tree: Any, first: int) -> Tensor:
        config, frame, prompt = self.model.config, self.model.config.num_codebooks, sequences.prompt_length
        columns = (scores.shape[1]) // frame
        out = scores.clone()
        for column in range(columns):
            if self.restore:
                self.inner = self.model._get_logits_processor(self.model.generation_config)[0]
            done = sequences.lengths[0] - prompt + column * frame
            said = torch.cat([sequences.tokens[:, prompt : sequences.lengths[0]], drafts], dim=1)[:, :done]
            ids = sequences.tokens[:, :prompt] - config.codebook_size
            steps = range(done // frame + 1) if self.restore else [done // frame]
            for step in steps:
                seen = said[:, : step * frame].unflatten(1, (-1, frame)) if step else said[:, None, :0]
                ended = (seen == config.audio_stream_eos_id).any(2).int().cumsum(1) > 0
                audio = torch.where(ended, config.audio_delay_token_id, config.audio_token_id)[:, :step]
                here = slice(column * frame, (column + 1) * frame)
                now = self.inner(torch.cat([ids, audio], dim=1), scores[:, here].flatten(0, 1).flatten()[None])
            out[:, here] = now.view(1, frame, -1)
        return out


@pytest.mark.parametrize("restore", [True, False])
def test_a_processor_whose_state_is_not_put_back_after_a_rejection_is_noticed(restore: bool) -> None:
    p = pipe("higgs", "coupled")
    own = p.speech.generate(TEXTS[:1], do_sample=False)
    p.speech.processors = lambda sampling: ([Stateful(p.model, restore)], [])
    assert (p.tokens(TEXTS[:1], None, None, do_sample=False)[0] == own) == restore


def test_repetitions_are_drawn_again_as_generate_does() -> None:
    config = tiny_higgs()[0].config
    delays, frame, codes = Delays(config), config.num_codebooks, config.codebook_size
    generator = torch.Generator().manual_seed(0)
    said = torch.randint(0, 3, (1, 5 * frame), generator=generator)
    rows = Sequences(torch.full((1, 2), codes), 40)
    rows.tokens[:, 2 : 2 + said.shape[1]] = said
    rows.lengths = [2 + said.shape[1]]
    rows._sync()
    raw, scores = (2 * torch.randn(1, frame, codes, generator=generator) for _ in range(2))
    delays.raw = raw
    found = Repetitions(delays, 4, 2).over_drafts(scores, rows, said[:, :0], None, 0).exp()
    assert torch.allclose(found.sum(-1), torch.ones(1, frame))
    draws = 100_000
    drawn = scores.softmax(-1)[0].multinomial(draws, True, generator=generator)
    again = raw.softmax(-1)[0].multinomial(draws, True, generator=generator)
    window = said.view(-1, frame)[-4:]
    times = (window[:, :, None] == drawn[None]).sum(0)
    drawn = torch.where(times >= 2, again, drawn)
    for book in range(frame):
        assert g_test(drawn[book].bincount(minlength=codes), found[0, book]) > 1e-6
    assert not torch.allclose(found, scores.softmax(-1), atol=0.01)


# -- Dia ---------------------------------------------------------------------------------------------------------------


class Credulous(Channels):
    """Takes speech to end in a column because a draft has it end there."""

    def over_drafts(self, scores: Tensor, sequences: Any, drafts: Tensor, tree: Any, first: int) -> Tensor:
        said, index = said_with(sequences, drafts, first, scores.shape[1])
        ends = said.gather(1, index.clamp(max=said.shape[1] - 1)) == self.eos
        scores = super().over_drafts(scores, sequences, drafts, tree, first)
        return force(scores, torch.where(ends & (index % len(self.delays) == 0), self.eos, -1))


@pytest.mark.parametrize("kind", [Channels, Credulous])
def test_an_end_that_was_only_drafted_does_not_end_speech(kind: type[Channels]) -> None:
    p = pipe("dia, not guided", "coupled")
    own = p.speech.generate(TEXTS, do_sample=False)
    p.speech.processors = lambda knobs: ([kind(p.model.config, p.speech.start, p.speech.limit - 4)], [])
    assert (p.tokens(TEXTS, None, None, do_sample=False)[0] == own) == (kind is Channels)


def test_guidance_weighs_what_it_leaves_by_the_text_alone() -> None:
    c, u = torch.tensor([[2.0, 1.0, 0.0, 3.0]]), torch.tensor([[2.0, -1.0, 0.0, 9.0]])
    assert guide(c, u, 3.0, 2).softmax(-1).tolist() == [pytest.approx([0.7311, 0.2689, 0.0, 0.0], abs=1e-4)]


def test_the_guidance_scale_changes_what_is_said() -> None:
    said = [pipe(kind).tokens(TEXTS[:1], None, None, do_sample=False)[0] for kind in ("dia", "dia, not guided")]
    assert said[0] != said[1]
