"""What every rule promises besides its distribution: shapes, labels, no synchronisation, no change to its inputs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from gtest import g_test

from polyspec import verification as v
from polyspec.errors import InputError
from polyspec.verification.sampling import BLOCK, sample

VOCAB = 12


def gumbel(tokens, q, p, *, generator=None):
    noise = v.gumbel_noise(0, torch.arange(p.shape[1], device=p.device).expand(p.shape[:2]), p.shape[-1])
    return v.gumbel_match(tokens, q, p, noise=noise, generator=generator)


def near(tokens):
    return ((torch.arange(VOCAB)[:, None] + torch.arange(1, 4)) % VOCAB).to(tokens.device)


def with_neighbours(rule):
    return lambda tokens, *rest, **knobs: rule(tokens, *rest, neighbours=near(tokens), k=3, **knobs)


def overlapping(device):
    members = (torch.arange(VOCAB)[:, None] + torch.arange(3)) % VOCAB
    containing = (torch.arange(VOCAB)[:, None] - torch.arange(3)) % VOCAB
    return v.TokenGroups(members.to(device), containing.to(device))


def coarse(tokens, q, p, *, generator=None):
    return v.coarse_grained(tokens, q, p, groups=overlapping(p.device), generator=generator)


CHAINS = {
    "greedy_match": v.greedy_match,
    "speculative_sampling": v.speculative_sampling,
    "block_verification": v.block_verification,
    "gumbel_match": gumbel,
    "typical_acceptance": v.typical_acceptance,
    "threshold_rollback": v.threshold_rollback,
    "threshold_rollback_greedy": v.threshold_rollback_greedy,
    "speculative_cascade": v.speculative_cascade,
    "lantern": with_neighbours(v.lantern),
    "lantern_greedy": with_neighbours(v.lantern_greedy),
    "lantern_pp": with_neighbours(v.lantern_pp),
    "lantern_pp_greedy": with_neighbours(v.lantern_pp_greedy),
    "cool_sd": v.cool_sd,
    "grouped": lambda x, q, p, **g: v.grouped(x, q, p, codebook=p.new_ones(VOCAB, 2), **g),
    "coarse_grained": coarse,
    "sampled_tolerance": v.sampled_tolerance,
    "additive_tolerance": v.additive_tolerance,
    "topk_threshold": v.topk_threshold,
    "multi_token": v.multi_token,
    "multi_token_greedy": v.multi_token_greedy,
    "pcg": lambda x, q, p, **g: v.pcg(x, q, p, token_groups=lambda size: overlapping(p.device), **g),
}
STEPS = {
    "recursive with replacement": (partial(v.recursive_rejection, replacement=True), 3),
    "recursive without replacement": (partial(v.recursive_rejection, replacement=False), 3),
    "kseq": (v.kseq, 3),
    "spechub": (v.spechub, 2),
    "greedy_plus_one": (v.greedy_plus_one, 3),
    "importance_selection": (v.importance_selection, 2),
}
PARENTS = [-1, -1, 0, 0, 1]
TREES = {
    "walk_recursive": partial(v.walk_recursive, depth=2, children=2),
    "traversal_verification": v.traversal_verification,
    "walk_tolerant": partial(v.walk_tolerant, depth=2),
}


def chain_inputs(rows=6, length=3, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    q = torch.randn(rows, length, VOCAB, generator=generator).softmax(-1)
    p = torch.randn(rows, length + 1, VOCAB, generator=generator).softmax(-1)
    return tokens.to(device), q.to(device, dtype), p.to(device, dtype)


def step_inputs(k, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, VOCAB, generator=generator).softmax(-1)
    tokens = torch.multinomial(q, k, generator=generator)
    return p.to(device, dtype), tokens.to(device), q.to(device, dtype)


def tree_inputs(device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (6, len(PARENTS)), generator=generator)
    q, p = torch.randn(2, 6, len(PARENTS) + 1, VOCAB, generator=generator).softmax(-1)
    return tokens.to(device), torch.tensor(PARENTS, device=device), q.to(device, dtype), p.to(device, dtype)


def calls(device="cpu", dtype=torch.float32):
    """(name, rule, inputs) for every rule."""
    for name, rule in CHAINS.items():
        yield name, rule, chain_inputs(device=device, dtype=dtype)
    for name, (rule, k) in STEPS.items():
        yield name, rule, step_inputs(k, device, dtype)
    for name, rule in TREES.items():
        yield name, rule, tree_inputs(device, dtype)


ALL = [name for name, _, _ in calls()]


def one(name, **kwargs):
    return next((rule, inputs) for other, rule, inputs in calls(**kwargs) if other == name)


@pytest.mark.parametrize("name", ALL)
def test_no_rule_waits_for_the_device(name):
    """Meta tensors have no values: whatever would read one on the host raises."""
    rule, inputs = one(name, device="meta")
    rule(*inputs)


def test_what_has_no_verdict_does_not_wait_for_the_device_either():
    tokens, q, p = chain_inputs(device="meta")
    v.modified_rejection(tokens, q, p[:, :-1])
    v.walk_deterministic(tokens, tokens[0], torch.zeros(6, 4, dtype=torch.long, device="meta"))
    v.walk_topk_threshold(tokens, tokens[0], torch.zeros(6, 4, dtype=torch.long, device="meta"), p)
    v.reflection_coupling(q, q, q, 0.5)
    v.spechub_draft(q[:, 0])
    v.greedy_plus_one_draft(q, 3)


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_left_as_they_were(name):
    rule, inputs = one(name)
    before = [t.clone() for t in inputs]
    rule(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_work(name, dtype):
    rule, inputs = one(name, dtype=dtype)
    out = rule(*inputs)
    token = out.next_token if isinstance(out, v.Verdict) else out[2]
    assert token.dtype == torch.long and bool(((token >= 0) & (token < VOCAB)).all())


@pytest.mark.parametrize("name", ALL)
def test_torchs_default_type_changes_nothing(name):
    """A model loaded under a default of bfloat16 must not leave the rules with 8-bit random numbers."""
    rule, inputs = one(name)
    first = rule(*inputs, generator=torch.Generator().manual_seed(3))
    try:
        torch.set_default_dtype(torch.bfloat16)
        second = rule(*inputs, generator=torch.Generator().manual_seed(3))
    finally:
        torch.set_default_dtype(torch.float32)
    if isinstance(first, v.Verdict):
        first, second = (first.accepted, first.next_token), (second.accepted, second.next_token)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_the_same_generator_gives_the_same_verdict(name):
    rule, inputs = one(name)
    first, second = (rule(*inputs, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    if isinstance(first, v.Verdict):
        first, second = (first.accepted, first.next_token), (second.accepted, second.next_token)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CHAINS)
def test_an_empty_draft_gets_the_targets_token(name):
    tokens, q, p = chain_inputs(length=0)
    p = torch.nn.functional.one_hot(torch.arange(6), VOCAB).float().unsqueeze(1)
    verdict = CHAINS[name](tokens, q, p)
    assert verdict.accepted.tolist() == [0] * 6
    assert verdict.next_token.tolist() == list(range(6))


@pytest.mark.parametrize("name", CHAINS)
def test_no_rows_give_no_verdicts(name):
    tokens, q, p = chain_inputs(rows=0)
    verdict = CHAINS[name](tokens, q, p)
    assert verdict.accepted.shape == verdict.next_token.shape == (0,)


@pytest.mark.parametrize("name", [n for n in CHAINS if n != "speculative_cascade"])
def test_drafts_without_probabilities_are_taken(name):
    tokens, _, p = chain_inputs()
    verdict = CHAINS[name](tokens, None, p)
    assert bool(((verdict.accepted >= 0) & (verdict.accepted <= 3)).all())
    assert bool(((verdict.next_token >= 0) & (verdict.next_token < VOCAB)).all())


def test_cascades_need_draft_probabilities():
    tokens, _, p = chain_inputs()
    with pytest.raises(InputError, match="draft_probs"):
        v.speculative_cascade(tokens, None, p)


SAMPLED = ["speculative_sampling", "block_verification", "lantern", "cool_sd", "coarse_grained", "additive_tolerance"]


@pytest.mark.parametrize("name", SAMPLED)
def test_not_a_number_never_picks_a_token(name):
    tokens, q, p = chain_inputs(rows=200)
    p[::2] = math.nan
    verdict = CHAINS[name](tokens, q, p)
    assert bool((verdict.next_token[::2] == -1).all()) and bool((verdict.next_token[1::2] >= 0).all())
    assert bool((verdict.accepted[::2] == 0).all())


@pytest.mark.parametrize("name", SAMPLED)
def test_equal_distributions_accept_and_never_fail(name):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3000, 4, VOCAB, generator=generator).softmax(-1)
    tokens = torch.multinomial(p[:, :-1].reshape(-1, VOCAB), 1, generator=generator).view(3000, 3)
    verdict = CHAINS[name](tokens, p[:, :-1], p, generator=generator)
    assert bool((verdict.accepted == 3).all()) and bool((verdict.next_token >= 0).all())


@pytest.mark.parametrize("name", SAMPLED)
def test_tokens_the_drafter_gave_no_probability_do_no_harm(name):
    tokens, q, p = chain_inputs(rows=500)
    q = q.scatter(-1, tokens.unsqueeze(-1), 0)
    q = q / q.sum(-1, keepdim=True)
    verdict = CHAINS[name](tokens, q, p)
    assert bool(((verdict.next_token >= 0) & (verdict.next_token < VOCAB)).all())


def test_rows_do_not_touch_each_other():
    """A row that is NaN or impossible changes no other row's verdict."""
    tokens, q, p = chain_inputs(rows=50)
    broken = p.clone()
    broken[7] = math.nan
    for name in SAMPLED:
        whole, other = (
            CHAINS[name](tokens, q, probs, generator=torch.Generator().manual_seed(0)) for probs in (p, broken)
        )
        rest = torch.arange(50) != 7
        assert torch.equal(whole.next_token[rest], other.next_token[rest])
        assert torch.equal(whole.accepted[rest], other.accepted[rest])


@pytest.mark.parametrize("name", CHAINS)
def test_ill_formed_inputs_are_refused(name):
    tokens, q, p = chain_inputs()
    rule = CHAINS[name]
    for bad in (
        (tokens[0], q, p),
        (tokens.int(), q, p),
        (tokens, q, p[:, :-1]),
        (tokens, q, p.long()),
        (tokens, q.to("meta"), p),
        (tokens, q[..., :-1], p),
        (tokens, q[:-1], p),
    ):
        with pytest.raises(InputError):
            rule(*bad)


@pytest.mark.parametrize("name", STEPS)
def test_ill_formed_candidates_are_refused(name):
    rule, k = STEPS[name]
    p, tokens, q = step_inputs(k)
    for bad in ((p[0], tokens, q), (p, tokens.int(), q), (p, tokens, q[:, :-1]), (p[:-1], tokens, q)):
        with pytest.raises(InputError):
            rule(*bad)


def test_pairs_are_pairs():
    p, tokens, q = step_inputs(3)
    for rule in (v.spechub, v.importance_selection):
        with pytest.raises(InputError, match="two candidates"):
            rule(p, tokens, q)


def test_values_are_checked_on_request():
    tokens, q, p = chain_inputs()
    v.check_inputs(tokens, q, p)
    v.check_inputs(tokens, None, p)
    cases = [
        ((tokens + VOCAB, q, p), "draft_tokens"),
        ((tokens - VOCAB, q, p), "draft_tokens"),
        ((tokens, q, p * 1.01), "target_probs must sum to one"),
        ((tokens, torch.zeros_like(q), p), "draft_probs must sum to one"),
        ((tokens, q, p.masked_fill(p > 0.2, math.nan)), "NaN"),
        ((tokens, q, p - 0.1), "negative"),
    ]
    for inputs, message in cases:
        with pytest.raises(InputError, match=message):
            v.check_inputs(*inputs)


EXPECTED = {
    "greedy_match": "exact", "speculative_sampling": "exact", "block_verification": "exact", "gumbel_match": "exact",
    "typical_acceptance": "heuristic", "threshold_rollback": "heuristic", "speculative_cascade": "heuristic",
    "lantern": "bounded", "lantern_pp": "bounded", "cool_sd": "bounded", "grouped": "heuristic",
    "coarse_grained": "group-exact", "sampled_tolerance": "heuristic", "additive_tolerance": "heuristic",
    "topk_threshold": "heuristic", "modified_rejection": "exact", "reflection_coupling": "exact",
    "recursive_rejection": "exact", "kseq": "exact", "spechub": "exact", "greedy_plus_one": "exact",
    "importance_selection": "exact", "walk_deterministic": "exact", "walk_recursive": "exact",
    "traversal_verification": "exact", "walk_topk_threshold": "heuristic",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_every_rule_states_its_guarantee_and_source(name):
    rule = getattr(v, name)
    assert rule.guarantee == EXPECTED[name]
    assert len(rule.paper) == 10 and rule.paper[4] == "."
    assert callable(rule.greedy)
    assert rule.__doc__


def test_unknown_guarantees_are_refused():
    with pytest.raises(ValueError, match="guarantee"):
        v.rule(guarantee="lossless-ish", paper="0000.00000")


def test_public_names_are_there():
    assert v.__all__ == sorted(v.__all__)
    assert all(hasattr(v, name) for name in v.__all__)


@pytest.mark.parametrize("vocab", [1, 5, 4 * BLOCK, 4 * BLOCK + 1, 5000])
def test_sampling_never_draws_what_has_no_weight(vocab):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2000, vocab, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.9] = 0
    weights[:, vocab // 2] += 1e-6
    tokens = sample(weights, generator)
    assert bool((weights.gather(1, tokens[:, None]) > 0).all())
    first = torch.zeros(50, vocab)
    first[:, -1] = 1e-30
    assert bool((sample(first, generator) == vocab - 1).all())


def test_sampling_is_right_across_blocks():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3000, generator=generator).mul(2).exp()
    tokens = torch.cat([sample(weights.expand(2000, -1), generator) for _ in range(10)])
    assert g_test(tokens.bincount(minlength=3000), weights.double()) > 1e-6
    by_block = (tokens // BLOCK).bincount()
    assert g_test(by_block, torch.nn.functional.pad(weights.double(), (0, -3000 % BLOCK)).view(-1, BLOCK).sum(1)) > 1e-6


def test_sampling_falls_back_and_flags():
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    assert sample(weights).tolist() == [-1, 0, -1, -1]
    assert sample(weights, fallback=torch.tensor([[0.0, 1.0]]).expand(4, -1)).tolist() == [1, 0, -1, -1]
    assert sample(torch.ones(2, 3, 4)).shape == (2, 3)
