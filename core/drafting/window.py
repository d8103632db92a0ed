"""The drafter that starts Jacobi windows: an EAGLE head or a block drafter, whichever was trained.

A block drafter (DFlash, 2602.06036) predicts as many positions as its block has in one pass; an EAGLE head (2401.15077)
goes token by token, so it is asked for no more than the positions that are redrawn every round.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from polyspec.drafting.dflash import DFlash, DFlashModel
from polyspec.drafting.eagle import Eagle, EagleModel
from polyspec.drafting.heads import HeadDrafter, HeadModel, kind_of
from polyspec.errors import ConfigError

DRAFTERS: dict[str, type[HeadDrafter[Any]]] = {
    DFlashModel.config_class.model_type: DFlash,
    EagleModel.config_class.model_type: Eagle,
}


class WindowDrafter:
    """`WindowDrafter(heads)` is the Eagle or DFlash drafter for `heads`, a model or its folder."""

    kind = EagleModel  # of which one is shipped with the image sample

    def __new__(cls, heads: HeadModel | str | PathLike[str]) -> Any:
        found = kind_of(heads)
        if found not in DRAFTERS:
            raise ConfigError(f"windows start from a block drafter or an EAGLE head, not from {found!r} heads")
        return DRAFTERS[found](heads)
