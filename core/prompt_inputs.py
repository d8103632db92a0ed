"""What a model is told about a prompt beside its tokens: images, kinds of tokens, positions of its own.

All of it is needed once, in the pass over the prompt. Two things outlive that pass: positions, where a model counts
them in its own way (multimodal RoPE gives an image fewer than it has tokens; a slot of the cache is always the absolute
place in the sequence), and the features of the images, for drafters that look at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from polyspec.errors import ConfigError, InputError

KINDS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # one value a token, as `[B, P]`
ONCE = {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "inputs_embeds", *KINDS}


@dataclass(frozen=True, slots=True)
class Places:
    """Positions that are not simply 0, 1, 2 …: of the prompt's tokens, `table [.., S, P]`, the first `counts [S, 1]` of
    them real, and how far behind their slot's number later tokens' positions are, `shift [.., S, 1]`."""

    table: Tensor
    counts: Tensor
    shift: Tensor

    def of(self, slots: Tensor, present: Tensor | None) -> Tensor:
        """The positions `[.., S, T]` of tokens that sit in `slots [S, T]`; present: the rows still in the batch."""
        table, counts, shift = self.table, self.counts, self.shift
        if present is not None:
            table, counts, shift = table[..., present, :], counts[present], shift[..., present, :]
        index = slots.clamp(max=table.shape[-1] - 1).expand(*table.shape[:-1], -1)
        return torch.where(slots < counts, table.gather(-1, index), slots + shift)


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """once: keyword arguments of the model for its pass over the prompt alone. places: None if positions are simply
    counted. features: what stands in the place of the image placeholders, `[N, d]` in their order, None if there are no
    images or the model encodes them in the pass itself; image_sizes: how many belong to each image. bidirectional:
    whether tokens see some that follow them."""

    once: Mapping[str, Any] = field(default_factory=dict)
    places: Places | None = None
    features: Tensor | None = None
    image_sizes: tuple[int, ...] = ()
    bidirectional: bool = False


def split_once(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments for the prompt's pass alone, and for every pass."""
    once = {k: v for k, v in given.items() if k in ONCE and v is not None and not (isinstance(v, Mapping) and not v)}
    return once, {k: v for k, v in given.items() if k not in ONCE}


def gather_inputs(
    model: PreTrainedModel,
    tokens: Tensor,
    counts: Sequence[int],
    order: Tensor | None,
    once: Mapping[str, Any],
    positions: Tensor | None,
) -> PromptInputs:
    """Bring what goes with a prompt into the order of its packed tokens `[S, P]`, of which `counts[s]` are real.

    order: `[S, P']`, the columns that the packed tokens were taken from (None: as they are). positions: `[.., S, P']`.
    """

    def packed(x: Tensor) -> Tensor:
        if order is None:
            return x
        return x.expand(*x.shape[:-2], *order.shape).gather(-1, order.expand(*x.shape[:-2], -1, -1))[..., : max(counts)]

    images = image_features(once.get("mm_encoder_outputs"))
    features = torch.cat(images) if images else None
    given = {k: v for k, v in once.items() if k not in (*KINDS, "inputs_embeds")}
    kinds = {k: packed(once[k]) for k in KINDS if k in once}
    if (embeds := once.get("inputs_embeds")) is not None:
        index = None if order is None else order[:, : max(counts), None].expand(-1, -1, embeds.shape[-1])
        given["inputs_embeds"] = embeds if index is None else embeds.gather(1, index)
        given["input_ids"] = None
    mask = own_mask(model, tokens, counts, kinds)
    if mask is not None:
        given["attention_mask"] = mask
    places = None if positions is None else own_places(packed(positions.to(tokens.device)), counts)
    return PromptInputs(given, places, features, tuple(map(len, images)), mask is not None)


def own_places(table: Tensor, counts: Sequence[int]) -> Places | None:
    """Places from packed positions `[.., S, P]`; None if they are 0, 1, 2 … in every row."""
    real = torch.tensor(counts, device=table.device)[:, None]
    column = torch.arange(table.shape[-1], device=table.device)
    if bool(((table == column) | (column >= real)).all()):
        return None
    last = (real - 1).expand(*table.shape[:-1], 1)
    return Places(table, real, table.gather(-1, last) + 1 - real)


def own_mask(model: PreTrainedModel, tokens: Tensor, counts: Sequence[int], kinds: Mapping[str, Tensor]) -> Any:
    """The attention mask of a model in which an image's tokens, or a whole prefix, see each other both ways; else None."""
    make: Any = getattr(model, "create_masks_for_generate", None)
    if make is None or not kinds:
        return None
    real = torch.arange(tokens.shape[1], device=tokens.device) < torch.tensor(counts, device=tokens.device)[:, None]
    return make(
        config=model.config,
        inputs_embeds=torch.empty((*tokens.shape, 0), dtype=model.dtype, device=tokens.device),
        attention_mask=real.long(),
        past_key_values=None,
        position_ids=None,
        is_first_iteration=True,
        **kinds,
    )


def placeholder_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The token ids that stand for images and videos in a prompt; none for a text model."""
    names = ("image_token_id", "video_token_id")
    found = [getattr(model.config, name, None) for name in names]
    return tuple(int(i) for i in found if isinstance(i, int))


def image_features(encoded: Any) -> list[Tensor]:
    """What the model puts in the place of each image's placeholders `[n, d]`, out of generate's `mm_encoder_outputs`."""
    features = getattr((encoded or {}).get("image"), "pooler_output", None)
    if features is None:
        return []
    if isinstance(features, Tensor) and features.ndim == 2:
        features = [features]
    return [f.reshape(-1, f.shape[-1]) for f in features]


def check_placeholders(model: PreTrainedModel, input_ids: Tensor, given: Mapping[str, Any]) -> None:
    """InputError unless a placeholder in `input_ids [B, P]` stands for every image feature among the keyword arguments
    `given`, and text stands behind the last."""
    image = getattr(model.config, "image_token_id", None)
    encodes = "mm_encoder_outputs" in given and "image" in getattr(model, "input_modalities", ())
    if not isinstance(image, int) or not encodes:
        return
    found, there = int((input_ids == image).sum()), sum(map(len, image_features(given["mm_encoder_outputs"])))
    if found != there:
        raise InputError(
            f"the prompts hold {found} image placeholders (token {image}), but the images given fill {there}; give each "
            "prompt its own images, and let the processor write the placeholders"
        )
    if bool((input_ids[:, -1] == image).any()):
        row = int((input_ids[:, -1] == image).int().argmax())
        raise InputError(f"the prompt of row {row} ends in an image; put some text behind it")


def refuse_guidance(once: Iterable[str]) -> None:
    """ConfigError if there is anything but text: which images an unconditional prompt has is not defined."""
    if seen := [k for k in once if k != "inputs_embeds"]:
        raise ConfigError(f"guidance_scale is not supported with images in the prompt ({seen[0]}); leave it out")
