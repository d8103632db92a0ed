"""Constrained beam search: strict drafts change nothing about the list, whatever drafts, and nothing forbidden is found."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from beam_search import beam_search, catalogue, exhaustive, log_probs, prompts, run, same
from gtest import g_test
from tiny_models import VOCAB, build, noisy_copy, target

from polyspec.decoding.beam import Beam
from polyspec.decoding.search import ByGumbel
from polyspec.drafting.base import NoDraft
from polyspec.drafting.beam import ModelBeams
from polyspec.drafting.beam_heads import HeadBeams, block_logits, draft_beams
from polyspec.drafting.dflash import DFlash, DFlashModel
from polyspec.drafting.medusa import MedusaModel
from polyspec.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from polyspec.target import Target, make_target
from polyspec.verification import TopK, relaxed_topk, strict_topk

ITEMS = catalogue()
RAGGED = prompts(7, 3, 12, 1, 5)
WIDTHS = [5, 1, 12, 3, 20]


@cache
def drafter_model(family: str = "llama", noise: float = 0.2):
    return noisy_copy(target(family), noise)


@cache
def plain():
    return run(target("llama"), RAGGED, ITEMS, WIDTHS)


DRAFTERS = {
    "model": lambda: ModelBeams(drafter_model()),
    "model, narrow": lambda: ModelBeams(drafter_model(), 1),
    "model, poor": lambda: ModelBeams(drafter_model(noise=1.0)),
    "model, wide": lambda: ModelBeams(drafter_model(), 4.5),
    "heads": lambda: HeadBeams(MedusaModel.for_target(target("llama"), heads=3), 4),
    "block drafter": lambda: HeadBeams(DFlashModel.for_target(target("llama"), block=5, bridge=True), 4),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3", "mistral", "mixtral"])
def test_plain_search_finds_what_beam_search_is_defined_to(family):
    found, stats = run(target(family), RAGGED, ITEMS, WIDTHS)
    assert same(found, [beam_search(target(family), p, ITEMS, k) for p, k in zip(RAGGED, WIDTHS, strict=True)])
    assert stats.target_calls == ITEMS.shape[1]


@pytest.mark.parametrize("drafter", [None, "model"])
def test_with_beams_for_every_item_the_list_is_exhaustive_scoring(drafter):
    made = None if drafter is None else DRAFTERS[drafter]()
    found, _ = run(target("llama"), RAGGED[:3], ITEMS, [60, 100, 80], made)
    assert same(found, [exhaustive(target("llama"), p, ITEMS) for p in RAGGED[:3]])


@pytest.mark.parametrize("levels", [1, 2, 8])
@pytest.mark.parametrize("name", DRAFTERS)
def test_strict_drafts_change_nothing(name, levels):
    found, stats = run(target("llama"), RAGGED, ITEMS, WIDTHS, DRAFTERS[name](), levels=levels)
    assert same(found, plain()[0])
    assert stats.target_calls <= plain()[1].target_calls
    for row, (prompt, k) in enumerate(zip(RAGGED, WIDTHS, strict=True)):
        alone, _ = run(target("llama"), [prompt], ITEMS, [k], DRAFTERS[name](), levels=levels)
        assert same(alone, found[row : row + 1])


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "mistral"])
def test_strict_drafts_change_nothing_for_any_architecture(family):
    found, _ = run(target(family), RAGGED, ITEMS, WIDTHS, ModelBeams(drafter_model(family), 2))
    assert same(found, run(target(family), RAGGED, ITEMS, WIDTHS)[0])


@pytest.mark.parametrize(("count", "depth"), [(30, 1), (40, 2), (50, 3), (200, 4)])
def test_strict_drafts_change_nothing_for_any_number_of_levels(count, depth):
    items = catalogue(count, depth, seed=depth)
    found, stats = run(target("llama"), RAGGED, items, WIDTHS, DRAFTERS["model"]())
    expected, without = run(target("llama"), RAGGED, items, WIDTHS)
    assert same(found, expected)
    assert without.target_calls == depth and stats.target_calls <= depth


def test_a_hundred_beams_and_one_in_a_batch():
    items = catalogue(400, 3, 19)
    found, _ = run(target("llama"), RAGGED[:3], items, [100, 1, 37], DRAFTERS["model"]())
    assert [len(f) for f in found] == [100, 1, 37]
    assert same(found, [beam_search(target("llama"), p, items, k) for p, k in zip(RAGGED, [100, 1, 37], strict=False)])


@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_list_is_that_of_transformers_own_constrained_beam_search(k):
    model, allowed = target("llama"), {}
    for item in ITEMS.tolist():
        for n in range(len(item)):
            allowed.setdefault(tuple(item[:n]), set()).add(item[n])
    for prompt in RAGGED:
        begin = len(prompt)
        out = model.generate(
            torch.tensor([prompt]), num_beams=k, num_return_sequences=k, do_sample=False, max_new_tokens=4,
            eos_token_id=None, pad_token_id=0, length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, ids, begin=begin: sorted(allowed[tuple(ids[begin:].tolist())]),
        )  # fmt: skip
        scores = out.sequences_scores.tolist() if k > 1 else [None]
        theirs = [tuple(s) for s in out.sequences[:, begin:].tolist()]
        (ours,), _ = run(model, [prompt], ITEMS, [k], DRAFTERS["model"]())
        assert [item for item, _ in ours] == theirs
        assert all(s is None or abs(s - o) < 1e-4 for s, (_, o) in zip(scores, ours, strict=True))


# -- what must fail ------------------------------------------------------------------------------------------------------


def goes_on_with_most_of_them(tokens, q, scores, **knobs) -> TopK:
    """Accepts a step that drafted the best of the K, though not all."""
    right = strict_topk(tokens, q, scores, **knobs)
    return TopK(right.chosen, right.source, right.source[:, 0] >= 0)


def prefers_what_was_drafted(tokens, q, scores, **knobs) -> TopK:
    """Takes the best of the drafted where there are enough of them."""
    drafted = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool)
    drafted.scatter_(1, torch.where(tokens < 0, scores.shape[1], tokens), True)
    return strict_topk(tokens, q, torch.where(drafted[:, :-1], scores, scores - 1e3), **knobs)


def loses_the_last_place(tokens, q, scores, *, k, most, **knobs) -> TopK:
    """One beam too few, where there is more than one."""
    return strict_topk(tokens, q, scores, k=(k - 1).clamp(min=1), most=most, **knobs)


@pytest.mark.parametrize("wrong", [goes_on_with_most_of_them, prefers_what_was_drafted, loses_the_last_place])
def test_a_wrong_strict_rule_is_noticed(wrong):
    found, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, DRAFTERS["model, poor"](), rule=wrong)
    assert not same(found, plain()[0])


# -- filters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "model", "heads"])
@pytest.mark.parametrize("rule", [strict_topk, relaxed_topk])
def test_nothing_forbidden_or_unknown_is_ever_found(name, rule):
    allowed = torch.rand(5, len(ITEMS), generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[1], allowed[2, 4:] = False, False
    allowed[1, 7] = True
    drafter = None if name is None else draft_for(name, rule)
    for seed in range(5 if rule is relaxed_topk else 1):
        found, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, drafter, rule=rule, allowed=allowed, seed=seed)
        for row, (k, items) in enumerate(zip(WIDTHS, found, strict=True)):
            may = {tuple(i) for i, a in zip(ITEMS.tolist(), allowed[row].tolist(), strict=True) if a}
            assert {i for i, _ in items} <= may
            assert len({i for i, _ in items}) == len(items) == min(k, len(may))


def draft_for(name, rule):
    temperature = 1.0 if rule is relaxed_topk else None
    if name == "model":
        return ModelBeams(drafter_model(), 2, temperature)
    return HeadBeams(MedusaModel.for_target(target("llama"), heads=3), 4, temperature)


def test_a_filtered_list_is_that_of_a_catalogue_with_only_those_items():
    allowed = torch.rand(5, len(ITEMS), generator=torch.Generator().manual_seed(1)) < 0.3
    found, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, DRAFTERS["model"](), allowed=allowed)
    expected = [
        beam_search(target("llama"), p, ITEMS[a.numpy()], k) for p, a, k in zip(RAGGED, allowed, WIDTHS, strict=True)
    ]
    assert same(found, expected)


# -- sampled lists and the relaxed rule ----------------------------------------------------------------------------------


def test_a_sampled_list_is_the_same_with_and_without_drafts_and_alone():
    ranking = ByGumbel(torch.arange(5) + 11)
    expected, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, ranking=ranking)
    for name in DRAFTERS:
        assert same(run(target("llama"), RAGGED, ITEMS, WIDTHS, DRAFTERS[name](), ranking=ranking)[0], expected)
    alone, _ = run(target("llama"), RAGGED[2:3], ITEMS, WIDTHS[2:3], ranking=ByGumbel(torch.tensor([13])))
    assert same(alone, expected[2:3])
    other, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, ranking=ByGumbel(torch.arange(5)))
    assert not same(other, expected)


def plackett_luce(model, prompt, items, k):
    """Probability of every ordered list of k items, each drawn in turn from the model renormalised over what exists."""
    rows = [tuple(i) for i in items.tolist()]
    weights = []
    for item in rows:
        log_p = log_probs(model, [*prompt, *item])[len(prompt) - 1 : -1]
        chance = 1.0
        for d, token in enumerate(item):
            allowed = sorted({r[d] for r in rows if r[:d] == item[:d]})
            chance *= float(log_p[d, allowed].softmax(-1)[allowed.index(token)])
        weights.append(chance)
    table = torch.zeros([len(rows)] * k, dtype=torch.double)
    for index in torch.cartesian_prod(*[torch.arange(len(rows))] * k).tolist():
        left, chance = 1.0, float(len(set(index)) == k)
        for i in index:
            chance *= max(weights[i], 0) / max(left, 1e-12)
            left -= weights[i]
        table[tuple(index)] = chance
    return rows, table


class Forgetful(ByGumbel):
    """Perturbs every level afresh instead of conditioning on the parent: not sampling without replacement."""

    def __call__(self, parents, tokens, log_p):
        score, _ = super().__call__(parents, tokens, log_p)
        fresh = ByGumbel(self.seeds + 10**6)
        zero = type(parents)(parents.node, parents.score, torch.zeros_like(parents.key))
        return score, torch.where(score > -torch.inf, score + fresh(zero, tokens, log_p)[1], -torch.inf)


@pytest.mark.parametrize(
    ("ranking", "name", "right"), [(ByGumbel, None, True), (ByGumbel, "model", True), (Forgetful, None, False)]
)
def test_sampled_lists_have_the_distribution_of_draws_without_replacement(ranking, name, right):
    model = build("llama", scale=2.0)
    items = catalogue(6, 3, 2, seed=1)
    assert len({tuple(i) for i in items.tolist()}) >= 4
    rows, table = plackett_luce(model, RAGGED[1], distinct := torch.tensor(items).unique(dim=0).numpy(), 2)
    drafter = None if name is None else ModelBeams(noisy_copy(model, 0.3), 1.5)
    counts = torch.zeros_like(table)
    for start in range(0, 40_000, 4000):
        seeds = ranking(torch.arange(start, start + 4000))
        found, _ = run(model, [RAGGED[1]] * 4000, distinct, [2] * 4000, drafter, ranking=seeds)
        for (first, _), (second, _) in found:
            counts[rows.index(first), rows.index(second)] += 1
    assert (g_test(counts, table) > 1e-6) == right


def test_where_drafter_and_target_are_one_the_relaxed_rule_keeps_every_draft_under_settled_beams():
    one = ModelBeams(target("llama"), 2, 1.0)
    _, stats = run(target("llama"), RAGGED, ITEMS, WIDTHS, one, rule=relaxed_topk, levels=1)
    assert stats.target_calls == 2 and stats.acceptance_rate == 1


def test_the_relaxed_rule_is_reproducible_and_differs_between_seeds():
    go = partial(run, target("llama"), RAGGED, ITEMS, WIDTHS, draft_for("model", relaxed_topk), rule=relaxed_topk)
    assert same(go(seed=1)[0], go(seed=1)[0])
    assert not same(go(seed=1)[0], go(seed=2)[0])


def test_a_relaxed_list_is_ranked_by_the_target_s_scores():
    found, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, draft_for("model", relaxed_topk), rule=relaxed_topk)
    for prompt, items in zip(RAGGED, found, strict=True):
        exact = dict(exhaustive(target("llama"), prompt, ITEMS))
        scores = [s for _, s in items]
        assert scores == sorted(scores, reverse=True)
        assert all(abs(exact[item] - s) < 1e-3 for item, s in items)


def test_a_relaxed_list_of_a_low_temperature_is_the_likeliest():
    cold = partial(relaxed_topk, temperature=1e-3)
    found, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, ModelBeams(drafter_model(), 2, 1e-3), rule=cold)
    assert [{item for item, _ in row} for row in found] == [{item for item, _ in row} for row in plain()[0]]
    with pytest.raises(ConfigError, match="temperature must be > 0"):
        ModelBeams(drafter_model(), 2, 0.0)


# -- drafters ------------------------------------------------------------------------------------------------------------


def test_rows_that_have_finished_leave_the_batch(monkeypatch: pytest.MonkeyPatch):
    rows = []
    forward = Target.forward

    def counted(self, tokens, *rest):
        if self.model is target("llama"):
            rows.append(len(tokens))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(Target, "forward", counted)
    found, _ = run(target("llama"), RAGGED, ITEMS, WIDTHS, DRAFTERS["model"]())
    assert same(found, plain()[0])
    assert rows[0] == 5 and rows == sorted(rows, reverse=True) and rows[-1] < 5


def test_a_perfect_draft_model_needs_one_target_call():
    found, stats = run(target("llama"), RAGGED, ITEMS, WIDTHS, ModelBeams(target("llama")))
    assert stats.target_calls == 1 and stats.draft_calls == 3
    assert same(found, plain()[0])


def test_the_block_drafter_sees_what_it_sees_in_a_chain():
    """The distributions that beams are drafted from are those of the drafter's ordinary loop, row by row."""
    from polyspec.decoding.beam import BeamCache
    from polyspec.decoding.search import Search, pack
    from polyspec.trie import Trie

    heads = DFlashModel.for_target(target("llama"), block=5, bridge=True, seed=3)
    packed, lengths = pack(RAGGED)
    search = Search(Trie.build(ITEMS), packed, lengths, [1] * 5)
    wrapped = make_target(target("llama"), hidden_layers=heads.config.target_layers)
    cache, none = BeamCache(wrapped, search), packed[:, :0]
    cache.feed(none, cache.no_path(0), none, 1)
    drafter = DFlash(heads)
    with torch.no_grad():
        from polyspec.drafting.heads import TokenLayers

        ours = block_logits(heads, TokenLayers(wrapped, None, heads.config.even_embeddings), search, cache.hidden)
        for row, prompt in enumerate(RAGGED):
            assert torch.allclose(ours[row], chain_block(drafter, prompt)[0, 1:], atol=1e-4)


def chain_block(drafter, prompt):
    from polyspec.decoding.sequences import Sequences
    from polyspec.distributions import Greedy, Processing
    from polyspec.drafting.base import Context
    from polyspec.lengths import Fixed
    from polyspec.metrics import DecodingStats

    sequences = Sequences(torch.tensor([prompt]), 8)
    alone = make_target(target("llama"), hidden_layers=drafter.hidden_layers)
    output = alone.prefill(sequences.tokens[:, : len(prompt)], capacity=64)
    drafter.begin(
        Context(alone, sequences, Processing(), Greedy(), Fixed(4), DecodingStats()),
        None if output is None else output.hidden,
    )
    return drafter.block(4)


# -- bad input -----------------------------------------------------------------------------------------------------------

WRONG = {
    "no drafter": (
        lambda: Beam(strict_topk).check(make_target(target("llama")), NoDraft()),
        ConfigError,
        "draft_model",
    ),
    "nothing to draft with": (lambda: draft_beams(), ConfigError, "one of them"),
    "two things to draft with": (lambda: draft_beams(draft_model=1, heads=2), ConfigError, "one of them"),
    "no beams for a beam": (lambda: ModelBeams(drafter_model(), 0.5), ConfigError, "spread"),
    "no number of levels": (lambda: Beam(strict_topk, -1), ConfigError, "levels"),
    "heads that are none": (lambda: HeadBeams(target("llama")), ConfigError, "kind of heads"),
    "heads for another model": (
        lambda: HeadBeams(MedusaModel.for_target(build("llama", vocab=99))).check(make_target(target("llama"))),
        CheckpointError,
        "trained for",
    ),
    "heads that do not reach": (
        lambda: run(
            target("llama"), RAGGED, ITEMS, WIDTHS, HeadBeams(MedusaModel.for_target(target("llama"), heads=1))
        ),
        ConfigError,
        "reach",
    ),
    "an encoder-decoder": (
        lambda: Beam(strict_topk, 0).check(make_target(target("t5")), NoDraft()),
        UnsupportedModelError,
        "positions",
    ),
    "an encoder-decoder that drafts": (
        lambda: ModelBeams(target("t5")).check(make_target(target("llama"))),
        InputError,
        "encoder",
    ),
    "a draft model that lacks tokens": (
        lambda: ModelBeams(build("llama", vocab=VOCAB - 5)).check(make_target(target("llama"))),
        ConfigError,
        "every item token",
    ),
    "an empty prompt": (lambda: run(target("llama"), [[1], []], ITEMS, [1, 1]), InputError, "empty"),
    "scores that are NaN": (lambda: run(broken(), RAGGED, ITEMS, WIDTHS), InputError, "NaN"),
}


def broken():
    model = noisy_copy(target("llama"), 0.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    return model


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_one_clear_error(case):
    attempt, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        attempt()
