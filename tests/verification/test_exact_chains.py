"""Exact chain rules have the target's distribution; wrong ones do not pass for exact."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gtest import g_test
from verification.enumerable import FAILS, ROWS, chain_fit, complete, draw_chain, random_model, sequence_probs
from verification.wrong_rules import WRONG_FOR_SAMPLED_DRAFTS, softmax_next_to_argmax

from polyspec import verification as v


def gumbel(tokens, q, p, *, generator=None):
    """gumbel_match with a seed per row, so that rows are independent samples."""
    noise = v.gumbel_noise(torch.arange(len(tokens)), torch.arange(p.shape[1]).expand(p.shape[:2]), p.shape[-1])
    return v.gumbel_match(tokens, q, p, noise=noise, generator=generator)


EXACT = {
    "speculative_sampling": v.speculative_sampling,
    "block_verification": v.block_verification,
    "gumbel_match": gumbel,
    "cool_sd without relaxation": partial(v.cool_sd, delta=1.0, nu=0.0),
    "cool_sd stricter than exact": partial(v.cool_sd, delta=0.8, nu=0.3),
    "sampled_tolerance of one": partial(v.sampled_tolerance, tolerance=1),
    "additive_tolerance of zero": partial(v.additive_tolerance, beta=0.0),
}


@pytest.mark.parametrize(("length", "sparse"), [(0, False), (1, True), (3, False), (3, True)])
@pytest.mark.parametrize("name", EXACT)
def test_output_has_the_targets_distribution(name, sparse, length):
    model = random_model(length, vocab=4, length=length, sparse=sparse)
    assert chain_fit(EXACT[name], model) > FAILS


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_output_has_the_targets_distribution_for_deterministic_drafts(name, sparse):
    assert chain_fit(EXACT[name], random_model(5, vocab=4, length=3, sparse=sparse), one_hot=True) > FAILS


@pytest.mark.parametrize("name", ["speculative_sampling", "block_verification"])
def test_output_has_the_targets_distribution_with_a_larger_vocabulary(name):
    assert chain_fit(EXACT[name], random_model(3, vocab=8, length=2)) > FAILS


@pytest.mark.parametrize("rule", WRONG_FOR_SAMPLED_DRAFTS, ids=lambda rule: rule.__name__)
def test_wrong_rules_fail_the_same_test(rule):
    assert chain_fit(rule, random_model(3, vocab=4, length=3)) < FAILS


def test_argmax_drafts_with_a_softmax_beside_them_fail_the_same_test():
    model = random_model(3, vocab=4, length=3)
    generator = torch.Generator().manual_seed(0)
    tokens, _, p = draw_chain(model, ROWS, generator, one_hot=True)
    softmax = torch.stack([model.draft[i][_prefix(tokens[:, :i], 4)] for i in range(3)], 1)
    verdict = softmax_next_to_argmax(tokens, softmax, p, generator=generator)
    sequences = complete(model, tokens, verdict.accepted, verdict.next_token, generator)
    assert g_test(torch.bincount(sequences, minlength=4**4), sequence_probs(model)) < FAILS


def _prefix(tokens, vocab):
    prefix = torch.zeros(len(tokens), dtype=torch.long)
    for token in tokens.unbind(1):
        prefix = prefix * vocab + token
    return prefix


@pytest.mark.parametrize(
    "rule", [v.speculative_sampling, v.block_verification, v.cool_sd, v.additive_tolerance], ids=lambda r: r.__name__
)
def test_no_draft_probs_means_one_hot(rule):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, (500, 3), generator=generator)
    p = torch.randn(500, 4, 6, generator=generator).softmax(-1)
    one_hot = torch.nn.functional.one_hot(tokens, 6).float()
    implicit = rule(tokens, None, p, generator=torch.Generator().manual_seed(1))
    explicit = rule(tokens, one_hot, p, generator=torch.Generator().manual_seed(1))
    assert torch.equal(implicit.accepted, explicit.accepted)
    assert torch.equal(implicit.next_token, explicit.next_token)


def expected_accepted(model, rule_name):
    """E[accepted] by enumeration of all drafts: what the papers' theorems give, in float64."""
    total = 0.0
    for index in range(model.vocab**model.length):
        tokens = [index // model.vocab ** (model.length - 1 - i) % model.vocab for i in range(model.length)]
        prefix, drafted, joint, chain = 0, 1.0, [1.0], [1.0]
        excess = []
        for i, x in enumerate(tokens):
            p, q = model.target[i][prefix].double(), model.draft[i][prefix].double()
            excess.append(float((joint[-1] * p - q).clamp(min=0).sum()))
            drafted *= float(q[x])
            joint.append(min(1.0, joint[-1] * float(p[x] / q[x])))
            chain.append(chain[-1] * min(1.0, float(p[x] / q[x])))
            prefix = prefix * model.vocab + x
        if rule_name == "speculative_sampling":
            total += drafted * sum(chain[1:])
        else:
            h = [e / (e + 1 - j) if e + 1 - j > 0 else 1.0 for e, j in zip(excess, joint, strict=False)][1:]
            h.append(joint[-1])
            missed = 1.0
            for i in range(model.length, 0, -1):
                total += drafted * missed * h[i - 1] * i
                missed *= 1 - h[i - 1]
    return total


@pytest.mark.parametrize("seed", range(4))
def test_block_verification_never_accepts_fewer_tokens(seed):
    model = random_model(seed, vocab=3, length=3)
    least = expected_accepted(model, "speculative_sampling")
    most = expected_accepted(model, "block_verification")
    assert most >= least - 1e-9
    generator = torch.Generator().manual_seed(seed)
    tokens, q, p = draw_chain(model, ROWS, generator)
    for rule, expectation in ((v.speculative_sampling, least), (v.block_verification, most)):
        accepted = rule(tokens, q, p, generator=generator).accepted.double()
        assert abs(float(accepted.mean()) - expectation) < 6 * float(accepted.std()) / ROWS**0.5


def test_acceptance_rate_is_one_minus_total_variation():
    model = random_model(9, vocab=6, length=1)
    tokens, q, p = draw_chain(model, ROWS, torch.Generator().manual_seed(0))
    accepted = v.speculative_sampling(tokens, q, p, generator=torch.Generator().manual_seed(1)).accepted
    rate = float(accepted.float().mean())
    overlap = float(torch.minimum(model.target[0], model.draft[0]).sum())
    assert abs(rate - overlap) < 5 * 0.5 / ROWS**0.5


def test_greedy_match_keeps_argmaxes_only():
    scores = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 5.0]]]).expand(4, -1, -1)
    drafts = torch.tensor([[1, 0], [1, 2], [2, 0], [0, 0]])
    verdict = v.greedy_match(drafts, None, scores)
    assert verdict.accepted.tolist() == [2, 1, 0, 0]
    assert verdict.next_token.tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("rule", [v.speculative_sampling, v.block_verification], ids=lambda r: r.__name__)
def test_one_hot_targets_reproduce_greedy_matching(rule):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2000, 4, 5, generator=generator)
    q = torch.randn(2000, 3, 5, generator=generator).softmax(-1)
    tokens = torch.multinomial(q.view(-1, 5), 1, generator=generator).view(2000, 3)
    p = torch.nn.functional.one_hot(scores.argmax(-1), 5).float()
    sampled, greedy = rule(tokens, q, p, generator=generator), v.greedy_match(tokens, None, scores)
    assert torch.equal(sampled.accepted, greedy.accepted)
    assert torch.equal(sampled.next_token, greedy.next_token)


def test_gumbel_match_does_not_depend_on_the_drafter():
    rows, vocab, length = 300, 7, 4
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(rows, length + 1, vocab, generator=generator).softmax(-1)
    noise = v.gumbel_noise(3, torch.arange(length + 1).expand(rows, -1), vocab)
    plain = v.gumbel_argmax(p, noise)
    for seed in range(3):
        tokens = torch.randint(vocab, (rows, length), generator=generator.manual_seed(seed))
        tokens = torch.where(torch.rand(rows, length, generator=generator) < 0.7, plain[:, :-1], tokens)
        verdict = v.gumbel_match(tokens, None, p, noise=noise)
        for row in range(rows):
            kept = int(verdict.accepted[row])
            emitted = [*tokens[row, :kept].tolist(), int(verdict.next_token[row])]
            assert emitted == plain[row, : kept + 1].tolist()


@pytest.mark.parametrize("shape", [(), (50,), (40, 3)])
def test_modified_rejection_couples_as_well_as_possible(shape):
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, 5, generator=generator).softmax(-1)
    x = torch.multinomial(q, ROWS, replacement=True, generator=generator)
    if shape:
        x = x[: torch.Size(shape).numel()].view(shape)
    else:
        y, kept = v.modified_rejection(x, q.expand(ROWS, 5), p.expand(ROWS, 5), generator=generator)
        assert g_test(y.bincount(minlength=5), p) > FAILS
        assert abs(float(kept.float().mean()) - float(torch.minimum(p, q).sum())) < 0.01
        assert torch.equal(y[kept], x[kept]) and not bool((y[~kept] == x[~kept]).any())
        return
    y, kept = v.modified_rejection(x, q.expand(*shape, 5), p.expand(*shape, 5), generator=generator)
    assert y.shape == kept.shape == x.shape
