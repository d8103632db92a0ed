"""Whether drafting pays for a search of few rounds, learnt from whole searches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

FIRST, AGAIN = 2, 32  # searches of each kind before one is preferred; then one in so many is of the other kind


@dataclass(slots=True)
class Seen:
    """Seconds a search without drafts and with them, and how many there were of each."""

    seconds: list[float] = field(default_factory=lambda: [math.inf, math.inf])
    count: list[int] = field(default_factory=lambda: [0, 0])


class Worth:
    """Says before a search whether to draft, and sees how long it took; apart for searches of about as many rows and
    beams, to a factor of two. The list that a search finds is the same either way under a strict rule."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], Seen] = {}

    def of(self, rows: int, beams: int) -> Seen:
        return self.seen.setdefault((rows.bit_length(), beams.bit_length()), Seen())

    def drafts(self, rows: int, beams: int) -> bool:
        """Whether the coming search should draft."""
        seen = self.of(rows, beams)
        if min(seen.count) < FIRST:
            return seen.count[1] <= seen.count[0]
        better = seen.seconds[1] < seen.seconds[0]
        return better != (sum(seen.count) % AGAIN == 0)

    def note(self, rows: int, beams: int, drafted: bool, seconds: float) -> None:
        """A search took so long. The first ones may have had to prepare something: of them the shortest counts."""
        seen = self.of(rows, beams)
        old = seen.seconds[drafted]
        seen.count[drafted] += 1
        seen.seconds[drafted] = min(old, seconds) if seen.count[drafted] <= FIRST else 0.7 * old + 0.3 * seconds
