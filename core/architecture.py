"""What decoding must know of a model's architecture: whether drafts can be forgotten, and what its layers let a token see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from polyspec.errors import UnsupportedModelError


def check_rollback(model: PreTrainedModel) -> None:
    """UnsupportedModelError if the model keeps a state that cannot forget a drafted token."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if getattr(model, "_is_stateful", False) or recurrent:
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state{f' ({sorted(recurrent)} layers)' if recurrent else ''} that cannot be "
            "rolled back after a rejected draft; use recipe 'autoregressive' of transformers' own generate"
        )
    if getattr(config, "alibi", False) or any(hasattr(m, "build_alibi_tensor") for m in model.children()):
        raise UnsupportedModelError(
            f"{name} computes its position bias from a mask over whole rows and takes none over drafted tokens; choose a "
            "model with rotary or learnt positions"
        )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise UnsupportedModelError(
            f"{name} counts its local attention from the end of the cache, which drafted tokens move; choose another model"
        )
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise UnsupportedModelError(f"{name} does not take a transformers Cache, so drafts cannot be rolled back")


def attention_windows(config: Any) -> dict[str, Callable[..., Tensor] | None]:
    """What limits attention in each kind of layer, keyed as the model's forward expects its masks ("" = one mask)."""

    def sliding(distance: Tensor, *_: Tensor) -> Tensor:
        return distance < config.sliding_window

    def chunked(distance: Tensor, kept: Tensor, depth: Tensor, key_depth: Tensor) -> Tensor:
        size = config.attention_chunk_size
        return ((kept + depth) // size)[:, :, None] == ((kept + key_depth) // size)[:, None, :]

    known = {"full_attention": None, "sliding_attention": sliding, "chunked_attention": chunked}
    if kinds := getattr(config, "layer_types", None):
        return {kind: known[kind] for kind in dict.fromkeys(kinds)}
    if getattr(config, "sliding_window", None) is not None:
        return {"": sliding}
    if getattr(config, "attention_chunk_size", None) is not None:
        return {"": chunked}
    return {"": None}
