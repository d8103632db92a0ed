"""Whether to draft is learnt from whole searches, and changes no list."""

from __future__ import annotations

import pytest

import polyspec
from polyspec.decoding.worth import AGAIN, FIRST, Worth


def searches(worth: Worth, plain: float, drafted: float, count: int, rows: int = 4, beams: int = 10) -> list[bool]:
    chosen = []
    for _ in range(count):
        chosen.append(worth.drafts(rows, beams))
        worth.note(rows, beams, chosen[-1], drafted if chosen[-1] else plain)
    return chosen


@pytest.mark.parametrize(("plain", "drafted", "wanted"), [(1.0, 0.5, True), (1.0, 1.5, False)])
def test_the_faster_is_chosen_and_the_other_tried_again_now_and_then(plain: float, drafted: float, wanted: bool) -> None:
    chosen = searches(Worth(), plain, drafted, 10 * AGAIN)
    assert sorted(chosen[: 2 * FIRST]) == [False] * FIRST + [True] * FIRST, "each is tried first"
    others = [c for c in chosen[2 * FIRST :] if c != wanted]
    assert 8 <= len(others) <= 10


def test_what_prepared_something_first_is_not_held_against_it() -> None:
    worth = Worth()
    worth.note(1, 1, True, 60.0)
    assert searches(worth, 1.0, 0.5, 20, rows=1, beams=1)[3 * FIRST :].count(False) == 0


def test_a_search_of_another_size_is_another_matter_and_changes_are_noticed() -> None:
    worth = Worth()
    searches(worth, 1.0, 2.0, 20, rows=1)
    assert searches(worth, 1.0, 0.5, 20, rows=64)[-1]
    assert searches(worth, 4.0, 0.5, 4 * AGAIN, rows=1)[-8:] == [True] * 8


def test_lists_are_the_same_whether_drafted_or_not() -> None:
    history, found = [1, 50, 181], []
    pipe = polyspec.pipeline("recommendation", dtype="float32", device="cpu")
    for _ in range(2 * FIRST):
        result = pipe(history, k=10)
        found.append((result.stats.proposed_tokens > 0, [r.item_id for r in result.outputs[0]]))
    assert {drafted for drafted, _ in found} == {False, True}
    assert len({tuple(items) for _, items in found}) == 1
