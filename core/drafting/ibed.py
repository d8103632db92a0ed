"""One small model drafts from several prompts at once, and the mean of its distributions proposes the token.

TABED: Test-Time Adaptive Ensemble Drafting for Robust Speculative Decoding in LVLMs, 2601.20357: its batched ensemble
with equal weights (in-batch ensemble drafting, IbED; `tabed` has the weights that adapt). The prompts differ in what
stands for an image: M its features, T nothing, C a caption, P its pooled features. They are rows of one batch:

    P_ens(x) = Σ_m w_m · softmax(logits_m)(x),   w_m = 1/K

and all rows go on with the token drawn from P_ens. That is only another q: whatever rule verifies it stays exact.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polyspec.drafting.base import Context
from polyspec.drafting.draft_model import DraftModel
from polyspec.drafting.image_views import (
    Captioner,
    ImageAdapter,
    View,
    adapted,
    captioned,
    check_adapter,
    dropped,
    load_adapter,
    view_prompts,
)
from polyspec.errors import ConfigError
from polyspec.lengths import positive
from polyspec.target import Target

KINDS = "MTCP"


class Ibed(DraftModel):
    """An ensemble of the drafts that `draft_model` makes with an image, without, with a caption, with a pooled image.

    views: letters out of MTCP; None for all that can be made. M and P need an image_adapter (an `ImageAdapter` or its
    folder), C a captioner: a callable (row, number of the image in it) -> caption tokens. pool: how many image features
    become one in P. Raises ConfigError for views that cannot be made, InputError for an adapter of another width.
    """

    def __init__(
        self,
        draft_model: PreTrainedModel | str | PathLike[str],
        image_adapter: ImageAdapter | str | PathLike[str] | None = None,
        captioner: Captioner | None = None,
        views: str | None = None,
        pool: int = 4,
    ):
        super().__init__(draft_model)
        self.adapter, self.captioner, self.pool = load_adapter(image_adapter), captioner, positive("pool", pool)
        able = "".join(k for k in KINDS if k == "T" or (self.captioner if k == "C" else self.adapter) is not None)
        self.kinds = able if views is None else str(views)
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(f"views must be different letters out of {KINDS}, got {views!r}")
        if lacking := [k for k in self.kinds if k not in able]:
            need = "a captioner" if lacking[0] == "C" else "an image_adapter"
            raise ConfigError(f"view {lacking[0]} needs {need}=…; give one, or set views={able}")
        self.copies = len(self.kinds)

    def check(self, target: Target) -> None:
        super().check(target)
        check_adapter(self.adapter, self.model)

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        rows = context.sequences.batch
        self.weights = torch.full((rows, self.copies), 1 / self.copies, device=context.sequences.device)
        super().begin(context, hidden)

    def prompts(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        views = [self.view(kind) for kind in self.kinds]
        return view_prompts(self.context.target, self.context.sequences, self.model, views)

    def view(self, kind: str) -> View:
        """What stands for an image in the drafts of `kind`."""
        if kind == "T":
            return dropped
        if kind == "C":
            assert self.captioner is not None
            return captioned(self.captioner)
        assert self.adapter is not None
        return adapted(self.adapter.to(self.model.device), self.pool if kind == "P" else 1)  # type: ignore[arg-type]

    def mix(self, logits: Tensor) -> Tensor:
        """log P_ens `[B, T, V]` of all drafts' logits `[K·B, T, V]`."""
        probs = logits.float().softmax(-1).unflatten(0, (self.copies, -1))
        return torch.einsum("bk,kbtv->btv", self.weights, probs).log()
