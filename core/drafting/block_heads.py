"""Heads that predict a block of tokens independently, for trees: Medusa's or a block drafter's, whichever was trained."""

from __future__ import annotations

from os import PathLike

from polyspec.drafting.dflash import DFlash
from polyspec.drafting.heads import HeadDrafter, HeadModel, drafter_for
from polyspec.drafting.medusa import Medusa


def block_heads(heads: HeadModel | str | PathLike[str]) -> HeadDrafter:
    """The DFlash or Medusa drafter for `heads`, a model or its folder; ConfigError for others."""
    return drafter_for(heads, (DFlash, Medusa), "this tree is drafted by Medusa heads or a block drafter")


# which of them to take for a sample: the first there is
block_heads.shipped = ("dflash", "medusa")  # type: ignore[attr-defined]
