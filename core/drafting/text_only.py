"""A small language model that never sees the image drafts for a vision-language model.

On Speculative Decoding for Multimodal Large Language Models, 2404.08856. The drafter's prompt is the target's without its
image placeholders; drafts x ~ q(· | text) are verified as any others, accepted with min(1, p(x)/q(x)), so the output is
the target's. With an image adapter the drafter sees the image after all: the features of the target's vision tower, which
has run anyway, brought to the drafter's width.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from polyspec.drafting.draft_model import DraftModel
from polyspec.drafting.image_views import ImageAdapter, adapted, check_adapter, dropped, load_adapter, view_prompts
from polyspec.target import Target


class TextOnlyDraft(DraftModel):
    """A `DraftModel` whose prompt has the text only, or the text and adapted image features.

    draft_model: a language model with the target's tokenizer. image_adapter: an `ImageAdapter` or its folder. Raises, beside
    what `DraftModel` raises, InputError for an adapter of another width.
    """

    def __init__(
        self,
        draft_model: PreTrainedModel | str | PathLike[str],
        image_adapter: ImageAdapter | str | PathLike[str] | None = None,
    ):
        super().__init__(draft_model)
        self.adapter = load_adapter(image_adapter)

    def check(self, target: Target) -> None:
        super().check(target)
        check_adapter(self.adapter, self.model)

    def prompts(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        view = dropped if self.adapter is None else adapted(self.adapter.to(self.model.device))  # type: ignore[arg-type]
        return view_prompts(self.context.target, self.context.sequences, self.model, [view])
