"""Vision-language models inside transformers' `generate`.

Most need nothing of their own: their images, positions and masks travel as `polyspec.prompt_inputs` describes. Here are
those that do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polyspec.errors import UnsupportedModelError
from polyspec.target import Target


class PaliGemmaTarget(Target):
    """PaliGemma and PaliGemma 2: positions start at 1, and the model takes one mask for all kinds of layers.

    Raises UnsupportedModelError where a sliding window of PaliGemma 2 would matter.
    """

    def place(self, slots: Tensor) -> Tensor:
        return super().place(slots) + 1

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        if isinstance(own := self.once.get("attention_mask"), dict):
            self.once = {**self.once, "attention_mask": own["full_attention"]}
        if isinstance(mask, dict):
            assert self.cache is not None
            if self.cache.longest + tokens.shape[1] > self.config.sliding_window:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} takes one mask for all its layers, so text beyond its sliding window of "
                    f"{self.config.sliding_window} tokens is not supported; shorten the prompt or max_new_tokens"
                )
            mask = mask["full_attention"]
        return super().call(tokens, positions, mask, keep_logits)


TARGETS = {"paligemma": PaliGemmaTarget}
