"""What pipelines return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyspec.metrics import DecodingStats

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Audio:
    """`waveform [C, T]` float in [-1, 1] at `sample_rate` Hz."""

    waveform: Tensor
    sample_rate: int


@dataclass(frozen=True, slots=True)
class Recommendation:
    """An item, its title if known, and its score (log-probability)."""

    item_id: int
    title: str | None
    score: float


@dataclass(frozen=True, slots=True)
class Result:
    """`outputs`, one per prompt and copy: PIL.Image, Audio, str, or a list of Recommendation; and the run's `stats`."""

    outputs: list[Any]
    stats: DecodingStats
