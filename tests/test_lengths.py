"""Length policies, with costs that are given instead of measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import target

import polyspec
from polyspec import costs, lengths
from polyspec.lengths import Adaptive, Auto, Confidence, Fixed, Thompson
from polyspec.metrics import DecodingStats


def rounds(
    policy: Any,
    kept: Any,
    count: int = 60,
    *,
    call: float = 0.03,
    draft: float = 0.1,
    verify: float = 0.0,
    fixed_rounds: bool = False,
    calls: Any = lambda proposed: proposed,
    share: float = 0.07,
    device: str = "cuda",
    size: int = 10**9,
    rows: int = 1,
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> list[int]:
    """Lengths chosen over `count` rounds, where `kept(proposed)` drafts are kept, a target call on n tokens costs
    `1 + call * (n - 1)` seconds, verifying a token `verify` and drafting one `draft` seconds, in `calls(proposed)` calls of
    a drafter with `share` of the target's parameters. Nominal costs are those of `device` and `rows` rows, of a target of
    `size` parameters."""
    stats = DecodingStats(draft_ratio=share)
    model, place = SimpleNamespace(num_parameters=lambda: size), torch.device(device if fixed_rounds else "cpu")
    host = SimpleNamespace(device=place, model=model, cache_lengths=[0] * rows)
    context = SimpleNamespace(stats=stats, draws=SimpleNamespace(fixed_rounds=fixed_rounds), target=host)
    if monkeypatch is not None:
        found = {n: 1 + call * (n - 1) for n in costs.SIZES}
        monkeypatch.setattr(lengths, "call_costs", lambda context, most: found)
    policy.begin(context)
    chosen = []
    for _ in range(count):
        proposed = policy.next()
        chosen.append(proposed)
        stats.draft_seconds += draft * proposed
        stats.draft_calls += calls(proposed)
        stats.target_seconds += 1 + call * proposed
        stats.verify_seconds += verify * (1 + proposed)
        gained = [kept(proposed) + 1]
        stats.record(proposed, gained)
        policy.observe(proposed, gained, stats)
    return chosen


def nothing(proposed: int) -> int:
    return 0


def everything(proposed: int) -> int:
    return proposed


def test_fixed_is_fixed() -> None:
    assert rounds(Fixed(5), nothing, 4) == [5] * 4


@pytest.mark.parametrize("fixed_rounds", [False, True], ids=["measured", "nominal"])
def test_auto_gives_up_a_drafter_that_is_never_right(fixed_rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = rounds(Auto(16), nothing, 400, fixed_rounds=fixed_rounds, monkeypatch=monkeypatch)
    assert np.mean([n == 0 for n in chosen[100:]]) > 0.9
    assert max(chosen[100:]) == 1, "what it tries now and then is short"
    assert any(chosen[200:]), "it keeps looking"


@pytest.mark.parametrize("fixed_rounds", [False, True], ids=["measured", "nominal"])
def test_auto_drafts_as_far_as_it_may_with_a_drafter_that_is_always_right(
    fixed_rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = rounds(Auto(16), everything, fixed_rounds=fixed_rounds, monkeypatch=monkeypatch)
    assert set(chosen[20:]) == {16}


def test_auto_finds_the_length_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens are always right, the fourth never: 4 tokens for 1 + 3·(0.1 + 0.2) is the best there is."""
    chosen = rounds(Auto(16), lambda n: min(n, 3), 300, call=0.1, draft=0.2, monkeypatch=monkeypatch)
    assert np.mean([n == 3 for n in chosen[150:]]) > 0.9


def test_auto_counts_a_drafters_calls_where_it_must_not_time_them() -> None:
    """Every second draft is right, the drafter has 0.07 of the target's parameters. A token a call: 2 tokens yield 1.75
    for 1 + 2·(0.015 + 0.03 + 0.07), the best there is; a block a call: 5 tokens 1.97 for 1.1 + 5·0.015, and 4 and 6 hardly
    less for theirs."""
    means = []
    for calls in (lambda n: n, lambda n: int(n > 0)):
        coin = np.random.default_rng(0)

        def half(proposed: int, coin: np.random.Generator = coin) -> int:
            return min(proposed, int(coin.geometric(0.5)) - 1)

        means.append(np.mean(rounds(Auto(16, decay=1.0), half, 1200, fixed_rounds=True, calls=calls)[600:]))
    assert 1.5 < means[0] < 2.5 < 3.5 < means[1] < 6.5


def test_nominal_costs_are_those_of_the_device_the_model_and_the_batch() -> None:
    """Half of the drafts are right, a block a call: an accelerator and a small model have tokens to spare, a large model on a
    CPU has fewer, and a large batch of it none."""

    def mean(**knobs: Any) -> float:
        coin = np.random.default_rng(0)
        kept = lambda proposed: min(proposed, int(coin.geometric(0.5)) - 1)  # noqa: E731
        return float(np.mean(rounds(Auto(16), kept, 600, fixed_rounds=True, calls=lambda n: int(n > 0), **knobs)[100:]))

    assert mean() > mean(device="cpu") + 0.5
    assert mean(device="cpu", size=10**6) > mean(device="cpu") + 0.5
    assert mean(device="cpu") > 1.5 > 0.1 > mean(device="cpu", rows=64)


def test_auto_gives_up_a_good_drafter_that_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = rounds(Auto(16), everything, 400, draft=1.5, monkeypatch=monkeypatch)
    assert np.mean([n == 0 for n in chosen[100:]]) > 0.9


def test_auto_notices_that_a_workload_turns_predictable(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def turning(proposed: int) -> int:
        seen.append(proposed)
        return proposed if len(seen) > 200 else 0

    chosen = rounds(Auto(16), turning, 900, monkeypatch=monkeypatch)
    assert np.mean(chosen[100:200]) < 1
    assert np.mean(chosen[-50:]) > 10


def test_auto_starts_from_what_earlier_runs_taught_even_through_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    from copy import copy

    policy = Auto(16)
    rounds(copy(policy), nothing, 300, monkeypatch=monkeypatch)
    assert max(rounds(copy(policy), nothing, 30, monkeypatch=monkeypatch)) <= 1


def test_auto_carries_nothing_over_where_a_seed_has_to_give_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Auto(16)
    first = rounds(policy, nothing, 40, fixed_rounds=True, monkeypatch=monkeypatch)
    rounds(policy, everything, 40, monkeypatch=monkeypatch)
    policy.rows[0] = 64  # of an earlier run
    assert rounds(policy, nothing, 40, fixed_rounds=True, draft=5.0, monkeypatch=monkeypatch) == first
    policy.rows[0] = 64
    rounds(policy, nothing, 0, fixed_rounds=True, monkeypatch=monkeypatch)
    assert policy.rows[0] == 1


def checked_nodes(
    policy: Any, accepted: float, call: float, monkeypatch: pytest.MonkeyPatch, rows: int = 1
) -> list[int]:
    """How many of four nodes, worth 0.6, 0.3, 0.1 and 0.05, are checked over some rounds that accept so many tokens."""
    stats, running = DecodingStats(), torch.arange(rows) == 0
    sequences = SimpleNamespace(running_tensor=running)
    context = SimpleNamespace(
        stats=stats,
        draws=SimpleNamespace(fixed_rounds=False),
        sequences=sequences,
        target=SimpleNamespace(device=torch.device("cpu")),
    )
    monkeypatch.setattr(lengths, "call_costs", lambda context, most: {1: 1.0, 2: 1 + call})
    policy.begin(context)
    values = torch.tensor([[0.6, 0.3, 0.1, 0.05]]).log().repeat(rows, 1)
    values[1:] = -torch.inf  # rows that have stopped promise nothing
    chosen, coin = [], np.random.default_rng(0)
    for _ in range(60):
        policy.next()
        chosen.append(policy.budget(values))
        stats.target_seconds += 1 + call * chosen[-1]
        gained = [1 + int(coin.random() < accepted), *[0] * (rows - 1)]
        stats.record(2, gained, chosen[-1])
        policy.observe(2, gained, stats)
    return chosen


@pytest.mark.parametrize("rows", [1, 3])
def test_auto_checks_the_nodes_that_pay(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def last(accepted: float, call: float) -> int:
        return checked_nodes(Auto(4), accepted, call, monkeypatch, rows)[-1]

    assert last(1.0, 0.001) == 4, "where they cost next to nothing, all"
    # a node that costs 0.1 calls pays while it brings more than a tenth of what the round brings for each call
    assert last(1.0, 0.1) == 2
    assert last(1.0, 0.3) == 1
    assert last(0.2, 0.1) == 1, "of a drafter that promises five times what it holds the best one at most"
    assert checked_nodes(Fixed(4), 1.0, 0.3, monkeypatch)[-1] == 4


def test_adaptive_grows_when_any_row_accepts_all_and_shrinks_otherwise() -> None:
    policy, stats = Adaptive(4, minimum=2, maximum=9), DecodingStats()
    policy.begin(SimpleNamespace())  # type: ignore[arg-type]

    def after(gained: Sequence[int]) -> int:
        policy.observe(policy.next(), gained, stats)
        return policy.next()

    assert after([5, 1]) == 6
    assert after([7, 0]) == 8
    assert after([9, 2]) == 9, "never above the maximum"
    assert after([1, 1]) < 9
    assert [after([1, 1]) for _ in range(8)][-1] == 2, "never below the minimum"
    assert after([0, 3]) == 4


def test_confidence_stops_drafting_when_no_row_is_confident() -> None:
    policy = Confidence(0.5, 8)
    sure = torch.tensor([[[0.0, 5.0, 0.0]], [[0.0, 0.0, 0.0]]])
    assert policy.keep_drafting(sure)
    assert not policy.keep_drafting(sure[1:])


def test_thompson_drafts_longer_after_success_than_after_failure() -> None:
    assert np.mean(rounds(Thompson(16), everything, 80)[40:]) > 8
    assert np.mean(rounds(Thompson(16), nothing, 80)[40:]) < 2


def test_costs_of_target_calls_are_measured_once_a_model_and_leave_the_run_as_it_was() -> None:
    model = target("llama")
    costs._COSTS.pop(model, None)
    ids = torch.tensor([[5, 6, 7]])
    fast = polyspec.custom_generate("prompt_lookup", length="auto")
    expected = model.generate(ids, do_sample=False, max_new_tokens=24)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=24, custom_generate=fast), expected)
    (known,) = costs._COSTS[model].values()
    measured = dict(known)
    model.generate(ids, do_sample=False, max_new_tokens=24, custom_generate=fast)
    assert costs._COSTS[model] == {next(iter(costs._COSTS[model])): measured}
    assert measured[1] == 1 and all(cost > 0 for cost in measured.values())


def test_auto_does_not_give_up_for_a_streak_of_bad_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    coin, luck = np.random.default_rng(1), iter([0, 0, 0, 0])

    def unlucky_at_first(proposed: int) -> int:
        return min(proposed, next(luck, int(coin.random() < 0.5)))

    chosen = rounds(Auto(), unlucky_at_first, draft=0.05, monkeypatch=monkeypatch)
    assert (0, 0) not in pairwise(chosen), "four rejections in a row happen one time in sixteen"


@pytest.mark.parametrize("slow", [(0,), (0, 1), (0, 7, 8)], ids=["the first", "the first two", "more later"])
def test_auto_is_not_put_off_by_drafts_that_once_took_long(slow: tuple[int, ...]) -> None:
    """Everything is kept, a draft costs a tenth of a call; some took fifty, to make ready or as others used the machine."""
    stats, host = DecodingStats(), SimpleNamespace(device=torch.device("cpu"))
    policy, drafts, chosen = Auto(), 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths, "call_costs", lambda context, most: {1: 1.0, 17: 1.2})
        policy.begin(SimpleNamespace(stats=stats, draws=SimpleNamespace(fixed_rounds=False), target=host))  # type: ignore[arg-type]
        for _ in range(400):
            chosen.append(policy.next())
            stats.target_seconds += 1 + 0.2 * chosen[-1] / 16
            if chosen[-1]:
                stats.draft_seconds += 50.0 if drafts in slow else 0.1
                stats.draft_calls, drafts = stats.draft_calls + 1, drafts + 1
            stats.record(chosen[-1], [chosen[-1] + 1])
            policy.observe(chosen[-1], [chosen[-1] + 1], stats)
    assert np.mean(chosen[-200:]) > 12


def test_auto_counts_what_verifying_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    coin = np.random.default_rng(0)

    def half(proposed: int) -> int:
        return min(proposed, int(coin.random() < 0.5))

    # a draft makes 1.5 tokens out of one for 1.3 calls instead of one, and with verifying for 2.3 instead of 1.5
    assert rounds(Auto(), half, 100, call=0.2, monkeypatch=monkeypatch)[-30:].count(0) <= 1  # to check what costs are
    assert rounds(Auto(), half, 100, call=0.2, verify=0.5, monkeypatch=monkeypatch)[-30:].count(0) > 20


def test_auto_finds_out_that_costs_were_measured_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second token costs 0.9 calls, not the 0.1 that were measured: 1.6 tokens for 1.9 calls do not pay."""
    coin = np.random.default_rng(0)
    monkeypatch.setattr(lengths, "call_costs", lambda context, most: {1: 1.0, 2: 1.1})
    stats, host = DecodingStats(), SimpleNamespace(device=torch.device("cpu"))
    policy = Auto()
    policy.begin(SimpleNamespace(stats=stats, draws=SimpleNamespace(fixed_rounds=False), target=host))  # type: ignore[arg-type]
    chosen = []
    for _ in range(200):
        chosen.append(policy.next())
        stats.target_seconds += float(coin.lognormal(0, 0.1)) * (1 + 0.9 * chosen[-1])
        gained = [1 + min(chosen[-1], int(coin.random() < 0.6))]
        stats.record(chosen[-1], gained)
        policy.observe(chosen[-1], gained, stats)
    assert np.mean(chosen[100:]) < 0.2
