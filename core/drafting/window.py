"""The drafter that starts Jacobi windows: a block drafter or an EAGLE head, whichever was trained.

A block drafter (DFlash, 2602.06036) predicts as many positions as its block has in one pass; an EAGLE head (2401.15077)
goes token by token, so it is asked for no more than the positions that are redrawn every round.
"""

from __future__ import annotations

from os import PathLike

from polyspec.drafting.dflash import DFlash
from polyspec.drafting.eagle import Eagle
from polyspec.drafting.heads import HeadDrafter, HeadModel, drafter_for


def window_drafter(heads: HeadModel | str | PathLike[str]) -> HeadDrafter:
    """The DFlash or Eagle drafter for `heads`, a model or its folder; ConfigError for others."""
    return drafter_for(heads, (DFlash, Eagle), "windows are started by a block drafter or an EAGLE head")


window_drafter.shipped = ("dflash", "eagle")  # type: ignore[attr-defined]
