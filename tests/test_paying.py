"""The choice of drafts of continuous tokens costs no more than plain decoding, whatever they cost and hold; wrong prices do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from linear_gaussian import LinearGaussian, decode

from polyspec.decoding import prices as prices_module
from polyspec.decoding.prices import prices_of
from polyspec.errors import ConfigError
from polyspec.paying import Paying, Prices, Round

STEPS, WINDOW, TOKENS = 50, 8, 64
CHEAP = Prices(alone=10, first=25, more=12, ahead=1.5)
DEAR = Prices(alone=10, first=70, more=45, ahead=3)
PLAIN = TOKENS * (CHEAP.alone + STEPS)


def spent(real: Prices, believed: Prices, acceptance: Callable[[int], float], held: int, tokens: int = TOKENS) -> float:
    """Cost of `tokens` tokens if rounds really cost `real`, tokens are kept as `acceptance(position)` says and the window
    takes `held` steps a call."""
    policy, random = Paying(4), torch.Generator().manual_seed(0)
    policy.begin_latents(STEPS, WINDOW, True, lambda: believed)
    made, total = 0, 0.0
    while made < tokens:
        count, window = policy.plan(tokens - made - 1)
        chance = [acceptance(made + i) for i in range(count)]
        kept = 0
        while kept < count and torch.rand((), generator=random) < chance[kept]:
            kept += 1
        left = STEPS if kept == count else STEPS // 2
        calls = left if window == 1 else 1 + -(-(left - 1) // held)
        total += real.round(count) + (left if window == 1 else 1 + (calls - 1) * real.ahead)
        policy.observe_latents(Round(count, window, [chance] if count else [], [left], calls))
        made += kept + 1
    return total


WORLDS: dict[str, tuple[Prices, Callable[[int], float], int]] = {
    "nothing holds, and it is dear": (DEAR, lambda i: 0.02, 1),
    "nothing holds, and it is cheap": (CHEAP, lambda i: 0.02, 1),
    "all holds, and is dear": (replace(DEAR, first=90, more=90, ahead=7), lambda i: 0.99, 6),
    "only the start holds": (DEAR, lambda i: 0.95 if i < 8 else 0.05, 1),
}


@pytest.mark.parametrize("world", WORLDS)
def test_drafting_is_never_much_dearer_than_plain_decoding(world: str) -> None:
    prices, acceptance, held = WORLDS[world]
    once = 1.1 if world.startswith("only") else 1.05  # the draft that was good must be seen to be so no more
    assert spent(prices, prices, acceptance, held) < once * PLAIN
    assert spent(prices, prices, acceptance, held, 10 * TOKENS) < 1.03 * 10 * PLAIN


def test_what_is_known_of_drafts_before_a_run_saves_trying_them() -> None:
    known = replace(DEAR, kept=0.02)
    tried, saved = (spent(prices, prices, lambda i: 0.02, 1) for prices in (DEAR, known))
    assert tried - saved >= 0.5 * DEAR.first, "the window, which is not known before, is tried all the same"
    assert spent(CHEAP, replace(CHEAP, kept=0.9), lambda i: 0.95, 1) < 0.6 * PLAIN, "what pays is taken"


def test_what_pays_is_taken() -> None:
    assert spent(CHEAP, CHEAP, lambda i: 0.95, 6) < 0.5 * PLAIN
    assert spent(CHEAP, CHEAP, lambda i: 0.05, 6) < 0.6 * PLAIN, "the window alone"
    assert spent(CHEAP, CHEAP, lambda i: 0.95, 1) < 0.6 * PLAIN, "tokens alone"


def test_wrong_prices_are_dearer_than_plain_decoding() -> None:
    """Parameter counts say that a draft of a fifth of the size costs a fifth; on this machine it costs nearly the same."""
    wrong = replace(DEAR, first=15, more=5, ahead=1)
    assert spent(DEAR, wrong, lambda i: 0.3, 2) > 1.2 * PLAIN


def test_prices_tell_a_slow_draft_from_a_fast_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("POLYSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(prices_module, "KNOWN", {})

    class Slow(LinearGaussian):
        size = 101

        def means(self, condition, x, step):
            for _ in range(20):
                super().means(condition, x, step)
            return super().means(condition, x, step)

    class Far(LinearGaussian):
        size = 102

    found: dict[str, Prices] = {}

    def watched(name):
        def prices(loop, context, drafter):
            found[name] = prices_of(loop, context, drafter)
            return found[name]

        return prices

    counts = {}
    for name, draft in (("fast", LinearGaussian(0.05)), ("slow", Slow(0.05)), ("far", Far(5.0))):
        monkeypatch.setattr("polyspec.decoding.continuous.prices_of", watched(name))
        _, stats = decode(LinearGaussian(), draft, rows=1000, policy=Paying(2))
        counts[name] = stats.draft_calls
    assert found["slow"].first > 2 * found["fast"].first
    assert counts["slow"] == 0
    assert found["fast"].kept > 0.5 > 0.1 > found["far"].kept
    kept = (tmp_path / "prices.json").read_text()
    monkeypatch.setattr(prices_module, "KNOWN", {})
    decode(LinearGaussian(), Slow(0.05), rows=1000, policy=Paying(2))
    assert (tmp_path / "prices.json").read_text() == kept, "what is known is not measured again"
    (tmp_path / "prices.json").write_text("{damaged")
    monkeypatch.setattr(prices_module, "KNOWN", {})
    decode(LinearGaussian(), LinearGaussian(0.05), rows=10, policy=Paying(2))


@pytest.mark.parametrize(
    "given",
    [
        {"alone": 1},
        {"alone": 1, "first": -1, "more": 1, "ahead": 1},
        {"alone": 1, "first": 1, "more": 1, "ahead": 1, "kept": 2},
        3,
        {"alone": "x"},
    ],
)
def test_prices_that_are_none_are_refused(given) -> None:
    with pytest.raises(ConfigError, match="prices must"):
        Paying(2, prices=given)
