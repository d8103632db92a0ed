"""Relaxed rules do what their papers' formulas say, token by token, and keep the bounds they state.

Every law is computed here from the formulas by plain loops over tokens, and the rules' output is tested against it.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from gtest import g_test
from verification.enumerable import FAILS, ROWS, draw_chain, random_model

from polyspec import verification as v
from polyspec.errors import ConfigError, InputError
from polyspec.verification.lantern import aggregate

V = 7


def pair(seed):
    generator = torch.Generator().manual_seed(seed)
    return (1.2 * torch.randn(2, V, generator=generator, dtype=torch.float64)).softmax(-1)


def codebook(seed=0, vocab=V):
    return torch.randn(vocab, 2, generator=torch.Generator().manual_seed(seed))


def neighbour_lists(embeddings, k):
    table = []
    for x in range(len(embeddings)):
        others = [t for t in range(len(embeddings)) if t != x]
        others.sort(key=lambda t, x=x: float((embeddings[t] - embeddings[x]).square().sum()))
        table.append(others[:k])
    return table


def law(q, accept, residual):
    """The law of the emitted token: x ~ q is accepted with accept(x), else a draw from norm(residual(x))."""
    out = torch.zeros(V, dtype=torch.float64)
    for x in range(V):
        a = accept(x)
        out[x] += q[x] * a
        weights = residual(x)
        if a < 1:
            out += q[x] * (1 - a) * weights / weights.sum()
    return out


def lantern_law(p, q, near, limit):
    hats = []
    for x in range(V):
        hat, mass = p.clone(), 0.0
        for t in near[x]:
            if mass + float(p[t]) > limit(x):
                break
            mass += float(p[t])
            hat[t] = 0
        hat[x] = p[x] + mass
        hats.append(hat)
    return law(q, lambda x: min(1.0, float(hats[x][x] / q[x])), lambda x: (hats[x] - q).clamp(min=0)), hats


def emitted(rule, q, p, seed=0, **knobs):
    """Counts of what is emitted at the first position of chains of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.multinomial(q.expand(ROWS, -1), 2, replacement=True, generator=generator)
    probs = p.float().expand(ROWS, 3, -1)
    verdict = rule(x, q.float().expand(ROWS, 2, -1), probs, generator=generator, **knobs)
    return torch.where(verdict.accepted > 0, x[:, 0], verdict.next_token).bincount(minlength=V)


@pytest.mark.parametrize("seed", range(3))
def test_lantern_follows_its_formula(seed):
    p, q = pair(seed)
    e = codebook(seed)
    expected, _ = lantern_law(p, q, neighbour_lists(e, 4), lambda x: 0.3)
    knobs = {"k": 4, "delta": 0.3}
    assert g_test(emitted(v.lantern, q, p, neighbours=v.nearest_neighbours(e, 6), **knobs), expected) > FAILS
    assert g_test(emitted(v.lantern, q, p, neighbours=v.nearest_neighbours(e, 6), **knobs), p) < FAILS  # it is not exact


@pytest.mark.parametrize("seed", range(3))
def test_lantern_pp_follows_its_formula(seed):
    p, q = pair(seed)
    e = codebook(seed)
    expected, _ = lantern_law(p, q, neighbour_lists(e, 4), lambda x: 2.0 * float(p[x]))
    assert g_test(emitted(v.lantern_pp, q, p, neighbours=v.nearest_neighbours(e, 6), k=4, lam=3.0), expected) > FAILS


def hostile_targets():
    """p [R, V]: random, flat, one-hot, half zero, one token next to nothing."""
    generator = torch.Generator().manual_seed(0)
    random = (2 * torch.randn(300, V, generator=generator)).softmax(-1)
    holes = random * (torch.rand(random.shape, generator=generator) < 0.5)
    holes[:, 0] += 0.01
    tiny = torch.cat([torch.full((V, V - 1), 1.0), torch.full((V, 1), 1e-9)], 1)
    return torch.cat([random, holes / holes.sum(-1, keepdim=True), torch.eye(V), tiny / tiny.sum(-1, keepdim=True),
                      torch.full((V, V), 1 / V)])  # fmt: skip


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 1.0])
def test_lantern_keeps_its_bound_for_every_drafted_token(k, delta):
    p = hostile_targets().repeat_interleave(V, 0)
    x = torch.arange(V).repeat(len(p) // V)[:, None]
    near = v.nearest_neighbours(codebook(), k)[x]
    p_hat, inside = aggregate(x, p.unsqueeze(1).expand(-1, 2, -1), near, delta)
    moved = torch.where(inside, p.unsqueeze(1).gather(-1, near), 0).sum(-1)  # = TV(p, p̂): mass moved from A to x
    assert float(moved.max()) <= delta + 1e-6
    assert torch.allclose(p_hat, p.gather(1, x) + moved, atol=1e-6)


@pytest.mark.parametrize("lam", [1.0, 5.0, 20.0])
def test_lantern_pp_keeps_its_bound_for_every_drafted_token(lam):
    p = hostile_targets().repeat_interleave(V, 0)
    x = torch.arange(V).repeat(len(p) // V)[:, None]
    near = v.nearest_neighbours(codebook(), 5)[x]
    p_x = p.gather(1, x)
    p_hat, _ = aggregate(x, p.unsqueeze(1).expand(-1, 2, -1), near, (lam - 1) * p_x.unsqueeze(-1))
    assert bool((p_hat <= lam * p_x * (1 + 1e-6)).all())


def test_without_relaxation_lantern_is_exact():
    p, q = pair(1)
    assert g_test(emitted(v.lantern, q, p, neighbours=v.nearest_neighbours(codebook(), 3), k=3, delta=0.0), p) > FAILS
    assert g_test(emitted(v.lantern_pp, q, p, neighbours=v.nearest_neighbours(codebook(), 3), k=3, lam=1.0), p) > FAILS


def test_lantern_deterministic_drafts_and_bonus_token():
    p, _ = pair(2)
    e = codebook(2)
    for x in range(V):
        q = torch.zeros(V, dtype=torch.float64)
        q[x] = 1
        _, hats = lantern_law(p, q + 1e-300, neighbour_lists(e, 3), lambda x: 0.4)
        drafts = torch.full((ROWS // 4, 1), x)
        probs = p.float().expand(ROWS // 4, 2, -1)
        generator = torch.Generator().manual_seed(x)
        verdict = v.lantern(drafts, None, probs, neighbours=v.nearest_neighbours(e, 3), k=3, delta=0.4, generator=generator)
        first = torch.where(verdict.accepted > 0, x, verdict.next_token)
        assert g_test(first.bincount(minlength=V), hats[x]) > FAILS
        assert g_test(verdict.next_token[verdict.accepted == 1].bincount(minlength=V), p) > FAILS


def test_greedy_lantern_accepts_the_argmax_of_the_modified_target():
    e = codebook(3)
    generator = torch.Generator().manual_seed(0)
    p = (1.5 * torch.randn(400, 2, V, generator=generator)).softmax(-1)
    x = torch.randint(V, (400, 1), generator=generator)
    near = neighbour_lists(e, 3)
    verdict = v.lantern_greedy(x, None, p, neighbours=v.nearest_neighbours(e, 3), k=3, delta=0.35)
    for row in range(400):
        _, hats = lantern_law(p[row, 0].double(), p[row, 0].double(), near, lambda _: 0.35)
        token = int(x[row, 0])
        accepted = int(hats[token].argmax()) == token
        assert int(verdict.accepted[row]) == int(accepted)
        assert int(verdict.next_token[row]) == int(p[row, int(accepted)].argmax())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("delta", [0.5, 1.5, 4.0])
def test_cool_sd_follows_its_formula_and_keeps_its_bound(seed, delta):
    p, q = pair(seed)
    taken = torch.minimum(q, delta * p)
    expected = law(q, lambda x: float(taken[x] / q[x]), lambda x: (p - taken).clamp(min=0))
    assert bool((expected <= max(1.0, delta) * p + 1e-12).all())
    distance = float((expected - p).abs().sum() / 2)
    assert distance <= max(0.0, min(float((p - q).abs().sum() / 2), delta - 1)) + 1e-9
    assert g_test(emitted(v.cool_sd, q, p, delta=delta, nu=0.0), expected) > FAILS


def test_cool_sd_relaxes_less_along_the_chain():
    model = random_model(0, vocab=5, length=3)
    tokens, q, p = draw_chain(model, 50_000, torch.Generator().manual_seed(0))
    means = [float(v.cool_sd(tokens, q, p, delta=3.0, nu=nu).accepted.float().mean()) for nu in (0.0, 0.5, 2.0)]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("seed", range(3))
def test_cascades_are_exact_for_the_mixture(seed):
    p, q = pair(seed)
    for alpha in (0.0, 0.3, 5.0):
        tv = float((p - q).abs().sum() / 2)
        defer = float(q.max()) < float(p.max()) - alpha * tv
        assert g_test(emitted(v.speculative_cascade, q, p, alpha=alpha), p if defer else q) > FAILS


@pytest.mark.parametrize("seed", range(3))
def test_additive_tolerance_follows_its_formula(seed):
    p, q = pair(seed)
    expected = law(q, lambda x: min(1.0, min(1.0, float(p[x] / q[x])) + 0.25), lambda x: (p - q).clamp(min=0))
    assert g_test(emitted(v.additive_tolerance, q, p, beta=0.25), expected) > FAILS


@pytest.mark.parametrize("tolerance", [1, 3])
def test_sampled_tolerance_is_the_same_as_making_the_draws(tolerance):
    p, q = pair(4)
    generator = torch.Generator().manual_seed(1)
    x = torch.multinomial(q, ROWS, replacement=True, generator=generator)
    draws = torch.multinomial(p.expand(ROWS, -1), tolerance, replacement=True, generator=generator)
    literal = torch.where((draws == x[:, None]).any(1), x, draws[:, 0]).bincount(minlength=V).double()
    counts = emitted(v.sampled_tolerance, q, p, tolerance=tolerance)
    expected = law(q, lambda x: 1 - (1 - float(p[x])) ** tolerance, lambda x: p * (torch.arange(V) != x))
    assert g_test(counts, expected) > FAILS and g_test(literal, expected) > FAILS


def gsd_cluster(p, x, embeddings, size, gap, distance):
    others = [t for t in range(V) if t != x]
    above = sorted((t for t in others if p[t] >= p[x]), key=lambda t: float(p[t]))[: size // 2]
    below = sorted((t for t in others if p[t] < p[x]), key=lambda t: -float(p[t]))[: size // 2]
    near = [t for t in above + below if abs(float(p[t] - p[x])) < gap]
    if embeddings is not None:
        near = [t for t in near if float((embeddings[t] - embeddings[x]).square().sum()) < distance]
    return [x, *near]


@pytest.mark.parametrize("with_codebook", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_grouped_follows_its_formula(seed, with_codebook):
    p, q = pair(seed)
    e = codebook(seed) if with_codebook else None
    clusters = [gsd_cluster(p, x, e, 4, 0.1, 1.5) for x in range(V)]
    expected = law(
        q, lambda x: min(1.0, float(p[clusters[x]].sum() / q[clusters[x]].sum())), lambda x: (p - q).clamp(min=0)
    )
    counts = emitted(v.grouped, q, p, codebook=e, size=4, gap=0.1, distance=1.5)
    assert g_test(counts, expected) > FAILS


def test_grouped_in_a_window_follows_its_formula():
    """Every position of a window of drafts that are never rejected before it: the first decides alone."""
    p, q = pair(0)
    clusters = [gsd_cluster(p, x, codebook(), 4, 0.1, 1.5) for x in range(V)]
    expected = law(
        q, lambda x: min(1.0, float(p[clusters[x]].sum() / q[clusters[x]].sum())), lambda x: (p - q).clamp(min=0)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.multinomial(q.expand(ROWS, -1), 2, replacement=True, generator=generator)
    y, kept = v.gsd(
        x, q.float().expand(ROWS, 2, -1), p.float().expand(ROWS, 3, -1), codebook=codebook(), size=4, gap=0.1,
        distance=1.5, generator=generator,
    )  # fmt: skip
    assert g_test(y[:, 0].bincount(minlength=V), expected) > FAILS
    assert g_test(y[~kept[:, 0], 1].bincount(minlength=V), p) > FAILS  # behind a rejection: afresh


GROUPS = {
    "partition": [[0, 3], [1], [2, 4, 6], [5]],
    "overlapping": [[0, 1, 2], [2, 3], [3, 4, 5, 0], [5], [6], [6, 1]],
}


def token_groups(groups):
    width = max(map(len, groups))
    containing = [[g for g, members in enumerate(groups) if t in members] for t in range(V)]
    depth = max(map(len, containing))
    return v.TokenGroups(
        torch.tensor([g + [-1] * (width - len(g)) for g in groups]),
        torch.tensor([[-1] * (depth - len(c)) + c for c in containing]),
    )


def pcg_law(p, q, groups):
    """The law of (token, group) emitted, [V, G]."""
    containing = [[g for g, members in enumerate(groups) if t in members] for t in range(V)]
    share = torch.tensor([1 / len(c) for c in containing], dtype=torch.float64)
    p_c, q_c = (torch.stack([(d * share)[g].sum() for g in groups]) for d in (p, q))
    joint = torch.zeros(V, len(groups), dtype=torch.float64)
    fresh = torch.zeros_like(joint)
    for t in range(V):
        for g in containing[t]:
            joint[t, g] = q[t] * share[t] * min(1.0, float(p_c[g] / q_c[g]))
            fresh[t, g] = p[t] * share[t] * max(0.0, 1 - float(q_c[g] / p_c[g]))
    return joint + (1 - joint.sum()) * fresh / fresh.sum(), p_c


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", GROUPS)
def test_coarse_grained_acceptance_is_exact_over_groups(kind, seed):
    p, q = pair(seed)
    joint, p_c = pcg_law(p, q, GROUPS[kind])
    assert torch.allclose(joint.sum(0), p_c)  # the groups' law is the target's
    counts = emitted(v.coarse_grained, q, p, groups=token_groups(GROUPS[kind]))
    assert g_test(counts, joint.sum(1)) > FAILS
    if kind == "partition":
        label = torch.tensor([next(i for i, g in enumerate(GROUPS[kind]) if t in g) for t in range(V)])
        by_group = torch.zeros(4, dtype=torch.long).index_add(0, label, counts)
        assert g_test(by_group, torch.zeros(4, dtype=torch.float64).index_add(0, label, p)) > FAILS
        same = v.TokenGroups.from_labels(label)
        assert g_test(emitted(v.coarse_grained, q, p, groups=same), joint.sum(1)) > FAILS


def test_coarse_grained_groups_of_deterministic_drafts():
    p, _ = pair(1)
    groups = GROUPS["overlapping"]
    for x in range(V):
        q = torch.full((V,), 1e-300, dtype=torch.float64)
        q[x] = 1
        joint, _ = pcg_law(p, q, groups)
        drafts = torch.full((ROWS // 4, 1), x)
        verdict = v.coarse_grained(
            drafts, None, p.float().expand(ROWS // 4, 2, -1), groups=token_groups(groups),
            generator=torch.Generator().manual_seed(x),
        )  # fmt: skip
        first = torch.where(verdict.accepted > 0, x, verdict.next_token)
        assert g_test(first.bincount(minlength=V), joint.sum(1)) > FAILS


def test_singleton_groups_make_coarse_grained_acceptance_exact():
    p, q = pair(2)
    assert g_test(emitted(v.coarse_grained, q, p, groups=v.TokenGroups.from_labels(torch.arange(V))), p) > FAILS


def test_groups_from_embeddings_are_those_of_the_formula():
    e = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    groups = v.TokenGroups.from_embeddings(e, 0.8, singletons=[5], largest=40, chunk=7)
    unit = torch.nn.functional.normalize(e, dim=-1)
    for t in range(40):
        close = {s for s in range(40) if float(unit[t] @ unit[s]) > 0.8 and 5 not in (s, t)} | {t}
        assert {s for s in groups.members[t].tolist() if s < 40} == close
        assert {s for s in groups.containing[t].tolist() if s < 40} == close
    capped = v.TokenGroups.from_embeddings(e, 0.5, largest=4)
    for t in range(40):
        listed = [s for s in capped.members[t].tolist() if s < 40]
        assert t in listed and len(listed) <= 4
        assert all(t in capped.members[s].tolist() for s in listed)


def test_typical_acceptance_thresholds():
    p = torch.tensor([[0.05, 0.95], [0.5, 0.5], [0.29, 0.71], [0.02, 0.98]])
    probs = p.unsqueeze(1).expand(-1, 2, -1)
    verdict = v.typical_acceptance(torch.zeros(4, 1, dtype=torch.long), None, probs)
    entropies = [-sum(float(a) * math.log(float(a)) for a in row) for row in p]
    expected = [float(row[0]) > min(0.3, 0.09 * math.exp(-h)) for row, h in zip(p, entropies, strict=True)]
    assert verdict.accepted.tolist() == [int(e) for e in expected] == [0, 1, 1, 0]


def test_threshold_rollback_keeps_what_is_likely_enough():
    p = torch.tensor([[0.2, 0.8], [0.1, 0.9], [0.14, 0.86]])
    probs = p.unsqueeze(1).expand(-1, 2, -1)
    drafts = torch.zeros(3, 1, dtype=torch.long)
    assert v.threshold_rollback(drafts, None, probs, rollback=2.0).accepted.tolist() == [1, 0, 1]
    greedy = v.threshold_rollback.greedy(drafts, None, probs, rollback=2.0)
    assert greedy.accepted.tolist() == [1, 0, 1] and greedy.next_token.tolist() == [1, 1, 1]


def test_topk_threshold_allows_the_likely_of_the_best():
    p = torch.tensor([0.55, 0.3, 0.08, 0.07])
    probs = p.expand(4, 2, 4)
    drafts = torch.arange(4)[:, None]
    assert v.topk_threshold(drafts, None, probs, k=2, threshold=0.1).accepted.tolist() == [1, 1, 0, 0]
    assert v.topk_threshold(drafts, None, probs, k=3, threshold=0.1).accepted.tolist() == [1, 1, 0, 0]
    assert v.topk_threshold(drafts, None, probs, k=3, threshold=0.05).accepted.tolist() == [1, 1, 1, 0]
    assert v.topk_threshold(drafts, None, probs, k=9, threshold=0.9).accepted.tolist() == [1, 0, 0, 0]
    one = v.topk_threshold(drafts, None, probs, k=1, threshold=0.0)
    greedy = v.greedy_match(drafts, None, probs)
    assert torch.equal(one.accepted, greedy.accepted) and torch.equal(one.next_token, greedy.next_token)


@pytest.mark.parametrize(
    ("rule", "knobs"),
    [
        (v.typical_acceptance, {"epsilon": 1.5}),
        (v.typical_acceptance, {"delta": -0.1}),
        (v.threshold_rollback, {"rollback": -1}),
        (v.speculative_cascade, {"alpha": -1}),
        (v.lantern, {"delta": 2, "neighbours": torch.zeros(V, 1, dtype=torch.long)}),
        (v.lantern, {"k": 0, "neighbours": torch.zeros(V, 1, dtype=torch.long)}),
        (v.lantern_pp, {"lam": 0.5, "neighbours": torch.zeros(V, 1, dtype=torch.long)}),
        (v.cool_sd, {"delta": -1}),
        (v.cool_sd, {"nu": float("nan")}),
        (v.grouped, {"size": 1}),
        (v.sampled_tolerance, {"tolerance": 0}),
        (v.additive_tolerance, {"beta": 1.1}),
        (v.topk_threshold, {"k": 0}),
        (v.topk_threshold, {"threshold": -0.1}),
    ],
)
def test_knobs_out_of_range_are_refused(rule, knobs):
    p = torch.full((1, 2, V), 1 / V)
    with pytest.raises(ConfigError):
        rule(torch.zeros(1, 1, dtype=torch.long), p[:, :1], p, **knobs)


@pytest.mark.parametrize(
    "call",
    [
        partial(v.lantern, neighbours=torch.zeros(V + 1, 2, dtype=torch.long)),
        partial(v.lantern, neighbours=torch.zeros(V, 2)),
        partial(v.grouped, codebook=codebook(vocab=V - 1)),
        partial(v.coarse_grained, groups=v.TokenGroups.from_labels(torch.arange(V + 1))),
    ],
)
def test_tables_of_another_vocabulary_are_refused(call):
    p = torch.full((1, 2, V), 1 / V)
    with pytest.raises(InputError):
        call(torch.zeros(1, 1, dtype=torch.long), p[:, :1], p)
