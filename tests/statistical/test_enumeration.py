"""Sampling by any exact recipe draws from the model's own distribution, end to end through loop and cache.

A model with five tokens generates four; the distribution over all sequences is enumerated by plain forward
passes, transformers' own processors and nothing of this package. Every recipe that is declared exact draws 40,000
sequences in large batches, in the slow tests 100,000 in every variant and a million in one; a G-test compares the counts
of all prefixes. Then rules and loops that are wrong on purpose have to fail the same test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from gtest import g_test
from recipe_needs import by_name, overrides, text_recipes
from tiny_models import llama, sharpen
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

import polyspec
from polyspec.cache import Layout, RaggedCache
from polyspec.decoding import chain, jacobi
from polyspec.decoding.proactive import ProactiveJacobi
from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Coupled, Independent, Processing
from polyspec.drafting import Draft
from polyspec.drafting.dflash import DFlashModel
from polyspec.drafting.eagle import EagleModel
from polyspec.guidance import Guidance, guide_log_probs
from polyspec.recipe import Recipe, find_recipe
from polyspec.target import Target
from polyspec.trees import Tree
from polyspec.verification import (
    Verdict,
    gumbel_noise,
    modified_rejection,
    sample,
    scd_mc,
    sjd,
    speculative_sampling,
    walk_recursive,
)
from polyspec.verification.block_verification import joint_acceptance

VOCAB, LENGTH, EOS, PAD = 5, 4, 4, 0
PROMPTS = ((1, 2, 3), (3, 1, 2, 2, 0, 1))
NEGATIVE = (2, 0)
THRESHOLD = 1e-6
BATCH = 5_000
SAMPLES = 100_000  # for every recipe, in every variant
FEWER = 40_000  # where minutes count
NOISE = 0.35  # how far drafters are from the target: about half of the drafts are kept
SMALL = {"length": 3, "window": 3, "candidates": 2, "nodes": 6}  # drafts no longer than what is generated
EXACT = text_recipes()


class StepsOfTwo:
    """A token may follow another at a distance of 1 or 2 only; behind a step that breaks this nothing may follow."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step = (torch.arange(VOCAB) - ids[:, -1:]) % VOCAB
        taken = (ids[:, -LENGTH:].diff(dim=1)) % VOCAB
        generated = ids.shape[1] - len(PROMPTS[0])
        broken = ((taken[:, -generated:] < 1) | (taken[:, -generated:] > 2)).any(1) if generated else ids[:, 0] < 0
        return scores.masked_fill((step < 1) | (step > 2) | broken[:, None], float("-inf"))


VARIANTS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.8, "top_k": 4, "eos_token_id": EOS},
    "guided": {"temperature": 0.9, "top_k": 4, "guidance_scale": 1.5, "negative": NEGATIVE, "eos_token_id": EOS},
    "temperature": {"temperature": 1.2},
    "nucleus": {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.5, "eos_token_id": EOS},
    "constrained": {"temperature": 0.8, "logits_processor": LogitsProcessorList([StepsOfTwo()])},
}


@cache
def model() -> PreTrainedModel:
    torch.manual_seed(10)  # a model whose next token is neither certain nor evenly spread, and which ends at times
    return sharpen(llama(vocab=VOCAB, layers=2, hidden=8, heads=2), 1.8).eval()


def generate_options(variant: str, rows: int) -> dict[str, Any]:
    options = {"eos_token_id": None, "top_k": 0, **VARIANTS[variant]}
    if "negative" in options:
        options["negative_prompt_ids"] = torch.tensor([options.pop("negative")]).expand(rows, -1)
    return {"do_sample": True, "max_new_tokens": LENGTH, "pad_token_id": PAD, **options}


@cache
@torch.no_grad()
def exact_distribution(variant: str, prompt: tuple[int, ...]) -> np.ndarray:
    """Probability of every sequence `[V] * LENGTH`, by one forward pass over all of them and transformers' processors."""
    prepared: list[Any] = []

    def capture(model: Any, input_ids: Tensor, logits_processor: Any, **_: Any) -> Tensor:
        prepared.extend(logits_processor)
        return input_ids

    ids = torch.tensor([prompt])
    model().generate(ids, **generate_options(variant, 1), custom_generate=capture)
    prefixes = torch.cartesian_prod(*[torch.arange(VOCAB)] * (LENGTH - 1))
    rows = torch.cat([ids.expand(len(prefixes), -1), prefixes], dim=1)
    logits = model()(rows).logits[:, len(prompt) - 1 :].float()
    table = torch.ones(())
    for step in range(LENGTH):
        chosen = torch.arange(VOCAB**step) * VOCAB ** (LENGTH - 1 - step)  # one row for every prefix of this length
        known, scores = rows[chosen, : len(prompt) + step], logits[chosen, step]
        for processor in prepared:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                given = processor.unconditional_context["input_ids"]
                start = ids[:, -1:] if given is None else given[:1]
                other = torch.cat([start.expand(len(chosen), -1), prefixes[chosen, :step]], dim=1)
                processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(
                    processor.guidance_scale, model(), unconditional_ids=other, use_cache=False
                )
            scores = processor(known, scores)
        probs = scores.double().softmax(-1).nan_to_num(0.0)
        if VARIANTS[variant].get("eos_token_id") is not None:
            ended = (prefixes[chosen, :step] == EOS).any(1)
            probs[ended] = torch.nn.functional.one_hot(torch.tensor(PAD), VOCAB).double()
        table = table.double().reshape(-1, 1) * probs
    assert abs(float(table.sum()) - 1) < 1e-6
    return table.reshape([VOCAB] * LENGTH).numpy()


Make = Callable[[], polyspec.CustomGenerate]


def draw(fast: polyspec.CustomGenerate, variant: str, prompts: tuple[tuple[int, ...], ...], samples: int) -> Tensor:
    """`samples` sequences `[len(prompts), samples, LENGTH]`, the prompts side by side in every batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([(PAD,) * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts])
    copies, drawn = BATCH // len(prompts), []
    for number in range(samples // copies):
        # rows take consecutive seeds; recipes have seeds of their own, so that one unlikely draw is not seen everywhere
        fast.seed = 10**6 * number + 10**9 * crc32(fast.method.recipe.name.encode())
        out = model().generate(
            input_ids=ids.repeat(copies, 1),
            attention_mask=mask.repeat(copies, 1),
            **generate_options(variant, copies * len(prompts)),
            custom_generate=fast,
        )[:, width:]
        out = torch.nn.functional.pad(out, (0, LENGTH - out.shape[1]), value=PAD)
        drawn.append(out.view(copies, len(prompts), LENGTH).transpose(0, 1))
    return torch.cat(drawn, dim=1)


def fit(sequences: Tensor, expected: np.ndarray) -> float:
    """The least p-value of a G-test on the first 1, 2, … LENGTH tokens of `sequences [S, LENGTH]`."""
    flat = np.ravel_multi_index(sequences.T.numpy(), expected.shape)
    counts = np.bincount(flat, minlength=expected.size).reshape(expected.shape)
    axes = [tuple(range(length, LENGTH)) for length in range(1, LENGTH + 1)]
    return min(g_test(counts.sum(rest), expected.sum(rest)) for rest in axes)


def p_value(
    fast: polyspec.CustomGenerate, variant: str, samples: int = SAMPLES, prompts: tuple[tuple[int, ...], ...] = PROMPTS[:1]
) -> float:
    drawn = draw(fast, variant, prompts, samples)
    return min(fit(rows, exact_distribution(variant, prompt)) for rows, prompt in zip(drawn, prompts, strict=True))


def made(recipe: str | Recipe, **knobs: Any) -> polyspec.CustomGenerate:
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    chosen = overrides(recipe, model(), NOISE, **{**SMALL, **knobs})
    return polyspec.custom_generate(recipe.name, **chosen)


def partly_accepted(fast: polyspec.CustomGenerate) -> bool:
    return not fast.stats.proposed_tokens or 0.02 < fast.stats.acceptance_rate < 0.98


# -- recipes that are right ------------------------------------------------------------------------------------------


@by_name(EXACT)
def test_sampled_sequences_have_the_models_distribution(recipe: Recipe) -> None:
    fast = made(recipe)
    assert p_value(fast, "sampled", FEWER) > THRESHOLD
    assert partly_accepted(fast), f"{recipe.name} accepts {fast.stats.acceptance_rate:.0%} of its drafts here"


@by_name(list({r.config.loop._target_: r for r in EXACT}.values()))
def test_sampled_sequences_have_the_guided_distribution_in_every_loop(recipe: Recipe) -> None:
    assert p_value(made(recipe), "guided", FEWER) > THRESHOLD


@by_name([r for r in EXACT if "init" in r.knobs and r.config.draws == "independent"])
@pytest.mark.parametrize("kind", [DFlashModel, pytest.param(EagleModel, marks=pytest.mark.slow)])
def test_sampled_sequences_have_the_models_distribution_where_windows_start_from_a_drafter(recipe: Recipe, kind: Any) -> None:
    chosen = overrides(recipe, model(), NOISE, **{**SMALL, "init": "drafter"})
    fast = polyspec.custom_generate(recipe.name, **{**chosen, "heads": kind.for_target(model())})
    assert p_value(fast, "guided", FEWER) > THRESHOLD
    assert partly_accepted(fast)


@pytest.mark.parametrize("name", ["speculative_sampling", "block_verification"])
@pytest.mark.parametrize(("kind", "sizes"), [(DFlashModel, {}), (DFlashModel, {"recurrent": 8}), (EagleModel, {})])
def test_sampled_sequences_have_the_models_distribution_where_heads_draft_for_a_model(
    name: str, kind: Any, sizes: dict[str, Any]
) -> None:
    fast = polyspec.custom_generate(name, draft_model=kind.for_target(model(), **sizes), length=3)
    assert p_value(fast, "guided", FEWER) > THRESHOLD
    assert partly_accepted(fast)


@pytest.mark.parametrize("name", ["dflash", "ddtree"])
def test_sampled_sequences_have_the_models_distribution_where_a_block_is_drafted_in_turn(name: str) -> None:
    fast = polyspec.custom_generate(name, heads=DFlashModel.for_target(model(), recurrent=8), length=3)
    assert p_value(fast, "guided", FEWER) > THRESHOLD
    assert partly_accepted(fast)


def redrawn(recipe: str | Recipe, refresh: int) -> polyspec.CustomGenerate:
    """Windows whose first positions an EAGLE head draws anew every round."""
    recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
    chosen = overrides(recipe, model(), NOISE, **{**SMALL, "init": "drafter", "refresh": refresh})
    return polyspec.custom_generate(recipe.name, **{**chosen, "heads": EagleModel.for_target(model())})


@pytest.mark.parametrize(
    ("recipe", "refresh"),
    [
        pytest.param(r, n, id=f"{r.name}-{n}", marks=() if (r.name, n) in (("scd_gs", 1), ("sjd_pac", 1)) else pytest.mark.slow)
        for r in EXACT
        if "refresh" in r.knobs and r.config.draws == "independent"
        for n in (1, 3)
    ],
)
def test_sampled_sequences_have_the_models_distribution_where_positions_are_redrawn(recipe: Recipe, refresh: int) -> None:
    fast = redrawn(recipe, refresh)
    assert p_value(fast, "guided", FEWER) > THRESHOLD
    assert partly_accepted(fast)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "sampled"])
@by_name(EXACT)
def test_sampled_sequences_have_the_models_distribution_in_every_variant(recipe: Recipe, variant: str) -> None:
    assert p_value(made(recipe), variant) > THRESHOLD


@pytest.mark.slow
@by_name(EXACT)
def test_sampled_sequences_have_the_models_distribution_with_a_million_samples(recipe: Recipe) -> None:
    assert p_value(made(recipe, length=4, window=6), "sampled", 1_000_000) > THRESHOLD


@pytest.mark.parametrize(
    "name", ["speculative_sampling", "block_verification", "sequoia", "scd_mc", "sjd_pac", "gumbel_jacobi"]
)
def test_every_row_of_a_ragged_batch_has_its_own_distribution(name: str) -> None:
    assert p_value(made(name), "sampled", FEWER // 2, prompts=PROMPTS) > THRESHOLD


@pytest.mark.parametrize("name", ["prompt_lookup", "scd_gs", "lookahead"])
def test_drafts_behind_which_nothing_is_allowed_leave_the_distribution_alone(name: str) -> None:
    assert p_value(made(name), "constrained", FEWER) > THRESHOLD


@pytest.mark.parametrize("name", ["speculative_sampling", "block_verification", "sequoia", "sjd", "scd_mc", "scd_gs"])
def test_rows_that_advance_together_keep_their_distribution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model without position ids, but two rows at a time: a cut common to all of them would always be at 0."""

    def fewest_of_two(accepted: Tensor, running: Tensor) -> Tensor:
        others = accepted.masked_fill(~running, LENGTH)
        least = others.view(-1, 2).amin(1, keepdim=True).expand(-1, 2).flatten()
        return least.masked_fill(least == LENGTH, 0)  # both rows have finished

    monkeypatch.setattr(chain, "fewest", fewest_of_two)
    monkeypatch.setattr(jacobi, "fewest", fewest_of_two)
    original = Target.__init__

    def lockstep(self: Target, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.lockstep = True

    monkeypatch.setattr(Target, "__init__", lockstep)
    assert p_value(made(name), "sampled", FEWER) > THRESHOLD


@pytest.mark.parametrize("policy", ["confidence", "thompson"])
def test_a_length_that_depends_on_the_drafts_leaves_the_distribution_alone(policy: str) -> None:
    assert p_value(made("speculative_sampling", length=policy), "sampled", FEWER) > THRESHOLD


def test_without_a_seed_every_batch_is_drawn_afresh() -> None:
    fast, drawn = made("speculative_sampling"), []
    for _ in range(FEWER // BATCH):
        drawn.append(
            model().generate(
                torch.tensor(PROMPTS[:1]).expand(BATCH, -1), **generate_options("sampled", BATCH), custom_generate=fast
            )[:, -LENGTH:]
        )
    assert fit(torch.cat(drawn), exact_distribution("sampled", PROMPTS[0])) > THRESHOLD


# -- rules and loops that are wrong ------------------------------------------------------------------------------------

WRONG_SAMPLES = 20_000  # most mistakes below are gross
Patch = Callable[[pytest.MonkeyPatch], polyspec.CustomGenerate]
WRONG: dict[str, tuple[str, int, Patch]] = {}


def wrong(variant: str = "sampled", samples: int = WRONG_SAMPLES) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        WRONG[patch.__name__] = (variant, samples, patch)
        return patch

    return register


def with_rule(name: str, **parts: Any) -> polyspec.CustomGenerate:
    """Recipe `name` with another acceptance rule (`verifier=` of a chain, `rule=` of a window)."""
    fast = made(name)
    fast.method = replace(fast.method, loop=type(fast.method.loop)(**parts))
    return fast


def chain_rule(accept: Callable[..., Tensor], rest: Callable[..., Tensor]) -> Callable[..., Verdict]:
    """A chain rule from what is kept, `accept(u, p(x), q(x))`, and from what the next token's weights are, `rest(p, q)`."""

    def rule(x: Tensor, q: Tensor, p: Tensor, *, generator: Any = None) -> Verdict:
        length = x.shape[1]
        if length == 0:
            return Verdict(x.new_zeros(len(x)), sample(p[:, 0], generator))
        px, qx = (d.gather(2, x[..., None])[..., 0] for d in (p[:, :length], q))
        kept = accept(torch.rand(x.shape, generator=generator), px, qx)
        accepted = kept.long().cumprod(1).sum(1)
        rows = torch.arange(len(x))
        at_p, at_q = p[rows, accepted], q[rows, accepted.clamp(max=length - 1)]
        weights = torch.where((accepted < length)[:, None], rest(at_p, at_q), at_p)
        return Verdict(accepted, sample(weights, generator, fallback=at_p))

    return rule


def right_accept(u: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return u * q < p


def right_rest(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).clamp(min=0)


@wrong()
def a_rejected_token_is_drawn_from_p(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("speculative_sampling", verifier=chain_rule(right_accept, lambda p, q: p))


@wrong()
def the_residual_is_of_either_sign(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("speculative_sampling", verifier=chain_rule(right_accept, lambda p, q: (p - q).abs()))


@wrong()
def the_residual_is_a_softmax(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("speculative_sampling", verifier=chain_rule(right_accept, lambda p, q: right_rest(p, q).softmax(-1)))


@wrong()
def drafts_are_accepted_with_q_over_p(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("speculative_sampling", verifier=chain_rule(lambda u, p, q: u * p < q, right_rest))


@wrong()
def drafts_are_accepted_with_p_whatever_q(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("speculative_sampling", verifier=chain_rule(lambda u, p, q: u < p, right_rest))


@wrong()
def every_draft_is_accepted(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("speculative_sampling", verifier=chain_rule(lambda u, p, q: u < 2, right_rest))


@wrong()
def the_bonus_token_is_from_the_position_before(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    def rule(x: Tensor, q: Tensor, p: Tensor, *, generator: Any = None) -> Verdict:
        if x.shape[1]:
            p = torch.cat([p[:, :-1], p[:, -2:-1]], dim=1)
        return speculative_sampling(x, q, p, generator=generator)

    return with_rule("speculative_sampling", verifier=rule)


@wrong()
def the_next_token_is_from_another_row(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    def rule(x: Tensor, q: Tensor, p: Tensor, *, generator: Any = None) -> Verdict:
        verdict = speculative_sampling(x, q, p, generator=generator)
        return Verdict(verdict.accepted, verdict.next_token.roll(1))

    return with_rule("speculative_sampling", verifier=rule)


def block_rule(stop_early: bool, plain_residual: bool) -> Callable[..., Verdict]:
    """Block verification from its equations, with one of two mistakes."""

    def rule(x: Tensor, q: Tensor, p: Tensor, *, generator: Any = None) -> Verdict:
        length = x.shape[1]
        if length == 0:
            return Verdict(x.new_zeros(len(x)), sample(p[:, 0], generator))
        px, qx = (d.gather(2, x[..., None])[..., 0] for d in (p[:, :length], q))
        joint = joint_acceptance(px, qx)
        excess = (joint[:, 1:length, None] * p[:, 1:length] - q[:, 1:]).clamp(min=0).sum(-1)
        inner = excess / (excess + 1 - joint[:, 1:length]).clamp(min=1e-9)
        h = torch.cat([inner, joint[:, length:]], dim=1)
        passed = torch.rand(x.shape, generator=generator) < h
        steps = torch.arange(1, length + 1)
        accepted = passed.long().cumprod(1).sum(1) if stop_early else torch.where(passed, steps, 0).amax(1)
        rows = torch.arange(len(x))
        at_p, at_q = p[rows, accepted], q[rows, accepted.clamp(max=length - 1)]
        weight = joint[rows, accepted][:, None]
        rest = ((at_p if plain_residual else weight * at_p) - at_q).clamp(min=0)
        rest = torch.where((accepted < length)[:, None], rest, at_p)
        return Verdict(accepted, sample(rest, generator, fallback=at_p))

    return rule


@wrong()
def a_block_stops_at_its_first_failure(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("block_verification", verifier=block_rule(stop_early=True, plain_residual=False))


@wrong(samples=SAMPLES)
def a_block_draws_from_the_tokenwise_residual(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("block_verification", verifier=block_rule(stop_early=False, plain_residual=True))


@wrong("sampled")
def the_drafter_reports_its_distribution_before_top_k(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original, draft_probs = Processing.scores, Independent.draft_probs
    seen: list[Tensor] = []

    def scores(self: Processing, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen[:] = [logits]
        return original(self, logits, *args, **kwargs)

    patch.setattr(Processing, "scores", scores)
    patch.setattr(Independent, "draft_probs", lambda self, scores: draft_probs(self, seen[0]))
    return made("speculative_sampling")


@wrong("sampled")
def drafts_are_checked_against_the_distribution_before_top_k(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = Processing.scores

    def scores(self: Processing, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return logits / 0.8 if logits.shape[1] > 1 else original(self, logits, *args, **kwargs)

    patch.setattr(Processing, "scores", scores)
    return made("speculative_sampling")


@wrong()
def a_kept_token_is_replaced_by_a_fresh_one(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    commit, verify = Sequences.commit, Independent.verify
    seen: list[Tensor] = []

    def record(self: Independent, rule: Any, draft: Any, scores: Tensor, positions: Tensor) -> Verdict:
        seen[:] = [scores[:, :-1].softmax(-1)]
        return verify(self, rule, draft, scores, positions)

    def replaced(self: Sequences, drafted: Tensor, *args: Any, **kwargs: Any) -> list[int]:
        return commit(self, sample(seen[0]) if drafted.shape[1] else drafted, *args, **kwargs)

    patch.setattr(Independent, "verify", record)
    patch.setattr(Sequences, "commit", replaced)
    return made("speculative_sampling")


@wrong()
def the_drafts_of_another_row_are_kept(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = Sequences.commit

    def commit(self: Sequences, drafted: Tensor, *args: Any, **kwargs: Any) -> list[int]:
        return original(self, drafted.roll(1, 0), *args, **kwargs)

    patch.setattr(Sequences, "commit", commit)
    return made("speculative_sampling")


def rollback_off_by(patch: pytest.MonkeyPatch, rows: slice, slots: int) -> None:
    """Streams `rows` keep `slots` cache slots too many (or too few) behind every round."""
    original = Target.rollback

    def rollback(self: Target, lengths: Any, _: Any = None) -> None:
        original(self, lengths)
        assert self.cache is not None
        kept = list(self.cache.lengths)
        kept[rows] = [max(0, n + slots) for n in kept[rows]]
        self.cache.rollback(kept)

    patch.setattr(Target, "rollback", rollback)


@wrong()
def the_cache_keeps_one_rejected_draft(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    rollback_off_by(patch, slice(None), 1)
    return made("prompt_lookup")


@wrong()
def the_cache_drops_one_committed_token(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    rollback_off_by(patch, slice(None), -1)
    return made("scd_mc")


@wrong()
def no_draft_is_ever_dropped_from_the_cache(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = Target.rollback

    def rollback(self: Target, lengths: Any, _: Any = None) -> None:
        assert self.cache is not None
        most = max(lengths)
        original(self, [most] * len(lengths))

    patch.setattr(Target, "rollback", rollback)
    return made("sjd")


@wrong("guided")
def the_unconditional_stream_keeps_one_rejected_draft(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    rollback_off_by(patch, slice(BATCH, None), 1)
    return made("sjd")


@wrong("guided")
def the_negative_prompt_loses_its_last_token(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    patch.setattr(Target, "unconditional", lambda self, tokens: tokens)
    return made("autoregressive")


@wrong("guided")
def guidance_comes_after_top_k(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    def combine(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        least = conditional.topk(3).values[..., -1:]
        conditional = conditional.masked_fill(conditional < least, float("-inf"))
        return guide_log_probs(conditional, unconditional, scale)

    original = Guidance.__init__

    def made_wrong(self: Guidance, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        object.__setattr__(self, "combine", combine)

    patch.setattr(Guidance, "__init__", made_wrong)
    return made("scd_gs")


@wrong("guided")
def guidance_is_left_out_where_drafts_are_checked(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = Guidance.__init__

    def made_wrong(self: Guidance, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        combine = self.combine
        object.__setattr__(self, "combine", lambda c, u, s: c if c.shape[1] > 2 else combine(c, u, s))

    patch.setattr(Guidance, "__init__", made_wrong)
    return made("speculative_sampling")


def refined(patch: pytest.MonkeyPatch, change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Change what a window is refined to: `change(x, q, y, kept, p)`."""
    original = Independent.refine

    def refine(self: Independent, rule: Any, x: Tensor, q: Tensor | None, scores: Tensor, positions: Tensor) -> Any:
        y, kept, p = original(self, rule, x, q, scores, positions)
        if q is None:
            q = torch.zeros_like(p[:, :-1]).scatter_(-1, x[..., None], 1.0)
        return change(x, q, y, kept, p)

    patch.setattr(Independent, "refine", refine)


@wrong()
def a_kept_window_token_keeps_its_old_distribution(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    def change(x: Tensor, q: Tensor, y: Tensor, kept: Tensor, p: Tensor) -> Any:
        p = p.clone()
        p[:, :-1] = torch.where(kept[..., None], q, p[:, :-1])
        return y, kept, p

    refined(patch, change)
    return made("scd_mc")


@wrong()
def a_rejected_window_token_is_drawn_from_p(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    refined(patch, lambda x, q, y, kept, p: (sample(p), kept, p))
    return made("sjd")


@wrong()
def a_window_moves_on_by_one_too_few(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = jacobi.Jacobi.slide

    def slide(self: Any, *args: Any) -> Any:
        *others, p, shift, width = args
        x, q = original(self, *args)
        if p is None:
            return x, q
        _, late = original(self, *others, p, shift - 1, width)
        return x, late

    patch.setattr(jacobi.Jacobi, "slide", slide)
    return made("scd_mc")


@wrong()
def a_guessed_window_token_passes_for_a_drawn_one(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = jacobi.Jacobi.slide

    def slide(self: Any, *args: Any) -> Any:
        x, q = original(self, *args)
        if q is None:
            return x, torch.full((*x.shape, VOCAB), 1 / VOCAB)
        return x, torch.where((q == 1).any(-1, keepdim=True), 1 / VOCAB, q)

    patch.setattr(jacobi.Jacobi, "slide", slide)
    return made("sjd")


@wrong()
def window_tokens_are_committed_up_to_the_last_kept_one(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    def rule(x: Tensor, q: Tensor, p: Tensor, *, generator: Any = None, noise: Any = None) -> tuple[Tensor, Tensor]:
        y, kept = scd_mc(x, q, p, generator=generator)
        return y, kept.flip(1).long().cummax(1).values.flip(1).bool()

    return with_rule("scd_mc", rule=rule)


@wrong()
def window_tokens_are_checked_against_the_next_position(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    def rule(x: Tensor, q: Tensor, p: Tensor, *, generator: Any = None, noise: Any = None) -> tuple[Tensor, Tensor]:
        if not x.shape[1]:
            return sjd(x, q, p, generator=generator)
        y, kept = modified_rejection(x, q, p[:, 1:], generator=generator)
        return torch.cat([y, sample(p[:, -1:], generator=generator)], dim=1), kept

    return with_rule("sjd", rule=rule)


def coupled_noise(patch: pytest.MonkeyPatch, noise: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    def perturbed(self: Coupled, scores: Tensor, positions: Tensor) -> Tensor:
        return scores + noise(self.noise.seeds, positions, scores.shape[-1])

    patch.setattr(Coupled, "perturbed", perturbed)


@wrong()
def all_positions_share_their_noise(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    coupled_noise(patch, lambda seeds, positions, vocab: gumbel_noise(seeds, torch.zeros_like(positions), vocab))
    return made("gumbel_jacobi")


@wrong()
def neighbouring_rows_share_their_noise(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    coupled_noise(patch, lambda seeds, positions, vocab: gumbel_noise(seeds // 100 * 100, positions, vocab))
    return made("gumbel_coupled")


@wrong()
def the_noise_is_half_as_strong(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    coupled_noise(patch, lambda seeds, positions, vocab: gumbel_noise(seeds, positions, vocab) / 2)
    return made("jacobi")


@wrong()
def siblings_see_each_other(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = RaggedCache.layout

    def causal(self: RaggedCache, new: int, tree: Tree | None, device: torch.device) -> Layout:
        at = original(self, new, tree, device)
        slots = at.base + (0 if tree is None else tree.size + 1 - new) + torch.arange(new)
        return replace(at, visible=torch.arange(self.longest + new) <= slots[..., None])

    patch.setattr(RaggedCache, "layout", causal)
    return made("sequoia")


@wrong()
def siblings_already_drawn_stay_in_q(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("sequoia", walk=partial(walk_recursive, replacement=True))


def drawn_siblings(patch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> polyspec.CustomGenerate:
    """Sequoia with other children: `change(tokens drawn, scores)`."""
    original = Independent.candidates

    def candidates(self: Independent, scores: Tensor, positions: Tensor, count: int) -> Tensor:
        return change(original(self, scores, positions, count), scores)

    patch.setattr(Independent, "candidates", candidates)
    return made("sequoia")


@wrong()
def the_likeliest_siblings_pass_for_drawn_ones(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return drawn_siblings(patch, lambda drawn, scores: scores.topk(drawn.shape[-1]).indices)


@wrong()
def siblings_are_tried_likeliest_first(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    def change(drawn: Tensor, scores: Tensor) -> Tensor:
        return drawn.gather(-1, scores.gather(-1, drawn).argsort(-1, descending=True))

    return drawn_siblings(patch, change)


@wrong()
def drafted_tokens_behind_the_end_are_kept(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = Sequences.commit

    def commit(self: Sequences, *args: Any, **kwargs: Any) -> list[int]:
        was, self.eos = self.eos, None
        gained = original(self, *args, **kwargs)
        self.eos = was
        ended = (self.tail(1) == EOS)[:, 0].tolist()
        self.running = [r and not e for r, e in zip(self.running, ended, strict=True)]
        self._sync()
        return gained

    patch.setattr(Sequences, "commit", commit)
    return made("speculative_sampling")


@wrong("constrained")
def history_dependent_processors_see_the_committed_tokens_only(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = Sequences.prefixes
    patch.setattr(Sequences, "prefixes", lambda self, drafted: original(self, drafted[:, :0]))
    return made("prompt_lookup")


@wrong(samples=SAMPLES)
def a_window_keeps_its_guess_but_claims_the_drafters_distribution(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = jacobi.FromDrafter.__call__

    def guessed(self: Any, context: Any, drafter: Any, guess: Tensor, offset: Tensor, refresh: int) -> Draft:
        return Draft(guess, original(self, context, drafter, guess, offset, refresh).probs)

    patch.setattr(jacobi.FromDrafter, "__call__", guessed)
    return made("sjd", init="drafter")


@wrong(samples=SAMPLES)
def a_redrawn_position_is_verified_against_what_the_window_had_there(
    patch: pytest.MonkeyPatch,
) -> polyspec.CustomGenerate:
    original = jacobi.Jacobi.slide

    def stale(self: Any, context: Any, drafter: Any, y: Tensor, p: Any, shift: Tensor, width: int) -> Any:
        x, q = original(self, context, drafter, y, p, shift, width)
        if p is None or q is None or not width:
            return x, q
        kept = (shift[:, None] + 1 + torch.arange(width)).clamp(max=y.shape[1] - 1)
        old = p.gather(1, kept[..., None].expand(-1, -1, p.shape[-1]))
        return x, torch.cat([old[:, :1].nan_to_num(nan=0.1), q[:, 1:]], dim=1)

    patch.setattr(jacobi.Jacobi, "slide", stale)
    return redrawn("sjd", 1)


@wrong()
def a_windows_siblings_are_verified_as_if_drawn_with_replacement(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return with_rule("sjd_pac", rule=scd_mc, walk=partial(walk_recursive, replacement=True))


@wrong()
def a_windows_siblings_are_not_drawn_from_the_stored_distribution(patch: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    original = ProactiveJacobi.children

    def flat(context: Any, weights: Tensor, count: int) -> Tensor:
        return original(context, (weights > 0).float(), count)

    patch.setattr(ProactiveJacobi, "children", staticmethod(flat))
    return made("sjd_pac")


@wrong()
def what_a_pool_holds_is_kept_where_it_is_likely(_: pytest.MonkeyPatch) -> polyspec.CustomGenerate:
    return made("dare", k=3, threshold=0.05)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_or_loop_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, samples, patch = WRONG[name]
    exact_distribution(variant, PROMPTS[0])  # before anything is broken
    assert p_value(patch(monkeypatch), variant, samples) < THRESHOLD
