"""Whatever drafts a chain for a rule to check: a smaller model, a block drafter, or an EAGLE head."""

from __future__ import annotations

from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from polyspec.drafting.dflash import DFlash
from polyspec.drafting.draft_model import DraftModel
from polyspec.drafting.eagle import Eagle
from polyspec.drafting.heads import drafter_for, kind_of

HEADS = "polyspec_"  # what the model types of draft heads begin with


def chain_drafter(draft_model: PreTrainedModel | str | PathLike[str]) -> Any:
    """The drafter for `draft_model`: trained heads of DFlash or EAGLE or their folder, or else what `DraftModel` takes.
    ConfigError for heads of another kind."""
    if not kind_of(draft_model).startswith(HEADS):
        return DraftModel(draft_model)
    wanted = "chains are drafted by a smaller model, a block drafter or an EAGLE head"
    return drafter_for(draft_model, (DFlash, Eagle), wanted)  # type: ignore[arg-type]


# which of them to take for a sample: the first there is
chain_drafter.shipped = ("draft_model", "dflash")  # type: ignore[attr-defined]
