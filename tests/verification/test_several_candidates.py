"""Rules for several candidates at one position: exact, and as good as their papers' formulas."""

from __future__ import annotations

from functools import partial
from itertools import chain, combinations

import pytest
import torch
from verification.enumerable import FAILS, ROWS, step_fit
from verification.wrong_rules import WRONG_FOR_SIBLINGS

from polyspec import verification as v
from polyspec.verification.importance_selection import selection


def pair(seed, vocab, sparse=False):
    """(p [V], q [V])."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.3 * torch.randn(2, vocab, generator=generator)
    if sparse:
        logits[torch.rand(logits.shape, generator=generator) < 0.35] = -torch.inf
        logits[:, -1] = logits[:, -1].nan_to_num(neginf=0.0)
    return logits.softmax(-1)


def with_replacement(q, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(q.expand(ROWS, -1), k, replacement=True, generator=generator)


def without_replacement(q, k, seed=0):
    """Distinct candidates in the order drawn; -1 once q has no more."""
    generator = torch.Generator().manual_seed(seed)
    left, tokens = q.repeat(ROWS, 1), []
    for _ in range(k):
        empty = left.sum(-1) <= 0
        x = torch.multinomial(torch.where(empty[:, None], 1.0, left), 1, generator=generator)
        left.scatter_(-1, x, 0)
        tokens.append(torch.where(empty, -1, x[:, 0]))
    return torch.stack(tokens, 1)


def spechub_pair(q, k):
    return v.spechub_draft(q.expand(ROWS, -1), generator=torch.Generator().manual_seed(0))


def greedy_plus_one_candidates(q, k):
    return v.greedy_plus_one_draft(q.expand(ROWS, -1), k, generator=torch.Generator().manual_seed(0))


EXACT = {
    "recursive with replacement": (partial(v.recursive_rejection, replacement=True), with_replacement, 3),
    "recursive without replacement": (partial(v.recursive_rejection, replacement=False), without_replacement, 3),
    "recursive, more than there are": (partial(v.recursive_rejection, replacement=False), without_replacement, 7),
    "kseq": (v.kseq, with_replacement, 3),
    "kseq, one candidate": (v.kseq, with_replacement, 1),
    "kseq, rho not solved for": (partial(v.kseq, bisections=0), with_replacement, 3),
    "spechub": (v.spechub, spechub_pair, 2),
    "greedy_plus_one": (v.greedy_plus_one, greedy_plus_one_candidates, 3),
    "greedy_plus_one, one candidate": (v.greedy_plus_one, greedy_plus_one_candidates, 1),
    "importance_selection": (v.importance_selection, with_replacement, 2),
    "importance_selection, unsolved": (partial(v.importance_selection, steps=0), with_replacement, 2),
}


@pytest.mark.parametrize(("seed", "sparse"), [(0, False), (2, True), (3, True)])
@pytest.mark.parametrize("name", EXACT)
def test_emitted_token_has_the_targets_distribution(name, seed, sparse):
    rule, propose, k = EXACT[name]
    p, q = pair(seed, 6, sparse)
    assert step_fit(rule, propose(q, k), q, p) > FAILS


@pytest.mark.parametrize("name", EXACT)
def test_certain_drafts_are_handled(name):
    rule, propose, k = EXACT[name]
    p, _ = pair(0, 5)
    q = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    assert step_fit(rule, propose(q, k), q, p) > FAILS


@pytest.mark.parametrize("name", EXACT)
def test_the_accepted_index_names_the_emitted_token(name):
    rule, propose, k = EXACT[name]
    p, q = pair(4, 6)
    tokens = propose(q, k)
    verdict = rule(p.expand(ROWS, -1), tokens, q.expand(ROWS, -1), generator=torch.Generator().manual_seed(1))
    hit = verdict.accepted > 0
    assert 0 < int(hit.sum()) <= ROWS
    assert torch.equal(tokens[hit].gather(1, verdict.accepted[hit, None] - 1)[:, 0], verdict.next_token[hit])


def test_deterministic_candidates_are_accepted_when_the_target_draws_them():
    p, _ = pair(1, 6)
    tokens = torch.tensor([[4, 1, 0]]).expand(ROWS, -1)
    verdict = v.recursive_rejection(p.expand(ROWS, -1), tokens, None, replacement=False)
    assert abs(float((verdict.accepted > 0).float().mean()) - float(p[[4, 1, 0]].sum())) < 0.01
    assert step_fit(_one_hot_candidates, tokens, p, p) > FAILS


def _one_hot_candidates(p, tokens, q, *, generator):
    return v.recursive_rejection(p, tokens, None, replacement=False, generator=generator)


@pytest.mark.parametrize("rule", WRONG_FOR_SIBLINGS, ids=lambda rule: rule.__name__)
def test_wrong_rules_fail_the_same_test(rule):
    p, q = pair(0, 6)
    assert step_fit(rule, without_replacement(q, 3), q, p) < FAILS


@pytest.mark.parametrize("k", [2, 3])
def test_top_k_drafts_verified_as_draws_from_q_fail_the_same_test(k):
    p, q = pair(0, 6)
    top = q.topk(k).indices.expand(ROWS, -1)
    assert step_fit(partial(v.recursive_rejection, replacement=False), top, q, p) < FAILS
    assert step_fit(v.kseq, top, q, p) < FAILS


def rate(rule, tokens, q, p):
    verdict = rule(p.expand(ROWS, -1), tokens, q.expand(ROWS, -1), generator=torch.Generator().manual_seed(2))
    return float((verdict.accepted > 0).float().mean())


NOISE = 5 * 0.5 / ROWS**0.5


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_rates_are_those_of_the_papers(seed):
    p, q = pair(seed, 6)
    k, top = 3, q.topk(2).indices
    rest = q.clone().scatter_(0, top, 0)
    overlap = p[top].sum() + torch.minimum(p, rest / rest.sum()).scatter(0, top, 0).sum()
    assert abs(rate(v.greedy_plus_one, greedy_plus_one_candidates(q, k), q, p) - float(overlap)) < NOISE

    hub = int(q.argmax())
    reach = q / (1 - q[hub])
    reach[hub] = 0
    taken = float(torch.minimum(p, reach).sum())
    assert abs(rate(v.spechub, spechub_pair(q, 2), q, p) - taken - min(float(p[hub]), 1 - taken)) < NOISE

    beta = torch.minimum(q, p / k).sum()  # at rho = k; the solved rho accepts at least as many
    unsolved, solved = partial(v.kseq, bisections=0), v.kseq
    assert abs(rate(unsolved, with_replacement(q, k), q, p) - float(1 - (1 - beta) ** k)) < NOISE
    assert rate(solved, with_replacement(q, k), q, p) > float(1 - (1 - beta) ** k) - NOISE


def two_draft_optimum(p, q):
    subsets = chain.from_iterable(combinations(range(len(p)), n) for n in range(len(p) + 1))
    return min(float(p[list(s)].sum() + 1 - q[list(s)].sum() ** 2) for s in subsets)


@pytest.mark.parametrize("seed", range(4))
def test_importance_selection_reaches_the_optimum(seed):
    p, q = pair(seed, 6)
    assert abs(rate(v.importance_selection, with_replacement(q, 2), q, p) - two_draft_optimum(p, q)) < NOISE + 0.003


@pytest.mark.parametrize("spread", [0.3, 0.8, 2.0])
def test_importance_selection_is_close_to_the_optimum_in_a_large_vocabulary(spread):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 5000, generator=generator)
    p, q = logits.softmax(-1), (logits + spread * torch.randn(3, 5000, generator=generator)).softmax(-1)
    y, _, _ = selection(p, q)
    assert torch.allclose(y.sum(-1), torch.ones(3), atol=1e-4)
    order = (p / q).argsort(-1)  # the minimising S is a prefix in the order of p/q
    optimum = (p.gather(1, order).cumsum(1) + 1 - q.gather(1, order).cumsum(1) ** 2).amin(1).clamp(max=1)
    loss = optimum - torch.minimum(p, y).sum(-1)
    assert float(loss.max()) < 0.01 and float(loss.min()) > -1e-4


@pytest.mark.parametrize("seed", range(3))
def test_more_candidates_are_accepted_more_often(seed):
    p, q = pair(seed, 6)
    recursive = partial(v.recursive_rejection, replacement=False)
    rates = [rate(recursive, without_replacement(q, k), q, p) for k in (1, 2, 4)]
    assert abs(rates[0] - float(torch.minimum(p, q).sum())) < NOISE
    assert rates[0] < rates[1] + NOISE and rates[1] < rates[2] + NOISE and rates[0] < rates[2]
