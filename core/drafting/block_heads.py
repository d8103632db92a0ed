"""Heads that predict a block of tokens independently, for trees: Medusa's or a block drafter's, whichever was trained."""

from __future__ import annotations

from os import PathLike
from typing import Any

from polyspec.drafting.dflash import DFlash, DFlashModel
from polyspec.drafting.heads import HeadDrafter, HeadModel, kind_of
from polyspec.drafting.medusa import Medusa, MedusaModel
from polyspec.errors import ConfigError

DRAFTERS: dict[str, type[HeadDrafter[Any]]] = {
    MedusaModel.config_class.model_type: Medusa,
    DFlashModel.config_class.model_type: DFlash,
}


class BlockHeads:
    """`BlockHeads(heads)` is the Medusa or DFlash drafter for `heads`, a model or its folder; ConfigError for others."""

    kind = MedusaModel
    shipped = ("dflash", "medusa")  # which of them to take for a sample, the first there is

    def __new__(cls, heads: HeadModel | str | PathLike[str]) -> Any:
        found = kind_of(heads)
        if found not in DRAFTERS:
            raise ConfigError(f"this tree is drafted by Medusa heads or a block drafter, not by {found!r} heads")
        return DRAFTERS[found](heads)
