"""Whatever drafts a chain for a rule to check: a smaller model, a block drafter, or an EAGLE head."""

from __future__ import annotations

from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from polyspec.drafting.draft_model import DraftModel
from polyspec.drafting.heads import kind_of
from polyspec.drafting.window import DRAFTERS
from polyspec.errors import ConfigError

HEADS = "polyspec_"  # what the model types of draft heads begin with


def chain_drafter(draft_model: PreTrainedModel | str | PathLike[str]) -> Any:
    """The drafter for `draft_model`: trained heads of DFlash or EAGLE or their folder, or else what `DraftModel` takes.
    ConfigError for heads of another kind."""
    kind = kind_of(draft_model)
    if kind.startswith(HEADS) and kind not in DRAFTERS:
        raise ConfigError(
            f"chains are drafted by a smaller model, a block drafter or an EAGLE head, not by {kind!r} heads"
        )
    return DRAFTERS.get(kind, DraftModel)(draft_model)


# which of them to take for a sample: the first there is
chain_drafter.shipped = ("draft_model", "dflash")  # type: ignore[attr-defined]
