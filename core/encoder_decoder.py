"""An encoder-decoder model as a `Target`: its decoder is what is accelerated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from polyspec.errors import ConfigError, InputError
from polyspec.target import Output, Target


class EncoderDecoderTarget(Target):
    """An encoder-decoder transformers model: the encoder has run, the decoder is what is accelerated."""

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Output | None:
        if self.guidance is not None:
            raise ConfigError("guidance_scale is not supported with an encoder-decoder model; leave it out")
        self.cross = DynamicCache()
        self.paired: EncoderDecoderCache | None = None
        past = kwargs.get("past")
        if past is not None and int(past.get_seq_length()) > 0:
            raise InputError("past_key_values of an encoder-decoder model cannot be continued; leave them out")
        return super().prefill(tokens, mask, **kwargs)

    def drop(self, running: Sequence[bool]) -> Tensor | None:
        stay = super().drop(running)
        if stay is not None:
            layers: Any = self.cross.layers
            for layer in layers:
                layer.keys, layer.values = layer.keys[stay], layer.values[stay]
            self.extra.update({name: of_rows(value, stay) for name, value in self.extra.items()})
        return stay

    def past(self, pads: Sequence[int]) -> Cache:
        return EncoderDecoderCache(super().past(pads), self.cross)

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        if self.paired is None:
            assert self.cache is not None
            self.paired = EncoderDecoderCache(self.cache, self.cross)
        kwargs: dict[str, Any] = {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
        if self.position_key:
            kwargs[self.position_key] = positions
        out = self.model(
            **kwargs,
            **self.extra,
            past_key_values=self.paired,
            use_cache=True,
            output_hidden_states=bool(self.hidden_layers),
            return_dict=True,
        )
        return out.logits if keep_logits else None, out.decoder_hidden_states


def of_rows(value: Any, rows: Tensor) -> Any:
    """`rows` of a tensor `[S, …]` or of all tensors in a transformers output."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, ModelOutput):
        return type(value)(**{k: of_rows(v, rows) for k, v in value.items()})
    return tuple(of_rows(v, rows) for v in value) if isinstance(value, tuple) else value
