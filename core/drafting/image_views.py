"""Ways to tell a drafter what stands where a prompt has images.

A drafter need not see what the target sees: an image's placeholders may be dropped, described, or filled with features
that the target's vision tower has computed already, brought to the drafter's width by an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from polyspec.decoding.sequences import Sequences
from polyspec.errors import ConfigError, InputError
from polyspec.pipelines import load
from polyspec.prompt_inputs import placeholder_ids
from polyspec.target import Target

View = Callable[[int, int, Tensor], "list[int] | Tensor"]
"""(row, number of the image in it, the target's features of it `[n, d]`) -> what stands for it in the drafter's prompt:
tokens, or embeddings `[m, d_q]`."""
Captioner = Callable[[int, int], Sequence[int]]
"""(row, number of the image in it) -> the tokens of a caption."""


class ImageAdapterConfig(PreTrainedConfig):
    """Widths of the target's image features, the layer between, and the drafter's embeddings."""

    model_type = "polyspec_image_adapter"
    feature_size: int = 0
    hidden_size: int = 0
    output_size: int = 0


class ImageAdapter(PreTrainedModel):
    """A target's image features `[.., feature_size]` to a drafter's embeddings `[.., output_size]` (2404.08856, §3)."""

    config_class: ClassVar[type[ImageAdapterConfig]] = ImageAdapterConfig

    def __init__(self, config: ImageAdapterConfig):
        super().__init__(config)
        self.first = nn.Linear(config.feature_size, config.hidden_size)
        self.second = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def forward(self, features: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(features)))


def load_adapter(adapter: ImageAdapter | str | PathLike[str] | None) -> ImageAdapter | None:
    """An adapter, or the folder of one. Raises CheckpointError if it cannot be loaded, ConfigError for anything else."""
    if isinstance(adapter, str | PathLike):
        return load(ImageAdapter.from_pretrained, str(adapter)).eval()
    if adapter is not None and not isinstance(adapter, ImageAdapter):
        raise ConfigError(f"image_adapter must be an ImageAdapter or the folder of one, got {type(adapter).__name__}")
    return adapter


def dropped(row: int, number: int, features: Tensor) -> list[int]:
    """Nothing: the drafter reads the text alone."""
    return []


def captioned(captioner: Captioner) -> View:
    return lambda row, number, features: list(captioner(row, number))


def adapted(adapter: ImageAdapter, pool: int = 1) -> View:
    """The features through `adapter`; of every `pool` of them, one after the other, only their mean."""

    def view(row: int, number: int, features: Tensor) -> Tensor:
        if features.shape[-1] != adapter.config.feature_size:
            raise InputError(
                f"the image adapter takes features of {adapter.config.feature_size}, the target's have "
                f"{features.shape[-1]}; train one for this target"
            )
        pooled = torch.stack([part.mean(0) for part in features.split(pool)]) if pool > 1 else features
        return adapter(pooled.to(device=adapter.device, dtype=adapter.dtype))

    return view


def check_adapter(adapter: ImageAdapter | None, model: PreTrainedModel) -> None:
    """InputError unless the adapter leads to the drafter's embeddings."""
    table: Any = model.get_input_embeddings().weight
    width = table.shape[-1]
    if adapter is not None and adapter.config.output_size != width:
        raise InputError(
            f"the image adapter gives embeddings of {adapter.config.output_size}, the drafter's have {width}; train one "
            "for this drafter"
        )


def view_prompts(
    target: Target, sequences: Sequences, model: PreTrainedModel, views: Sequence[View]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Every row's prompt as each view has it, view by view: tokens and mask `[K·B, P']`, padded on the left, and the
    embeddings that `model` gets in their place `[K·B, P', d_q]` if there are any other than tokens'."""
    features, rows = target.given.features, [h[:] for h in sequences.history]
    image, others = getattr(target.model.config, "image_token_id", None), placeholder_ids(target.model)
    starts = accumulate((row.count(image) for row in rows), initial=0)
    cut = [mark_images(row, image, others, target.given.image_sizes, s) for row, s in zip(rows, starts, strict=False)]
    prompts = [pieces(runs, row, view, features) for view in views for row, runs in enumerate(cut)]
    lengths = [sum(len(piece) for piece in prompt) for prompt in prompts]
    width = max(lengths)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    for line, prompt in enumerate(prompts):
        flat = [t for piece in prompt for t in (piece if isinstance(piece, list) else [0] * len(piece))]
        tokens[line, width - len(flat) :] = torch.tensor(flat)
    if all(isinstance(piece, list) for prompt in prompts for piece in prompt):
        return tokens.to(sequences.device), mask, {}
    embedding: Any = model.get_input_embeddings()
    embeds = embedding(tokens.to(model.device).clamp(max=embedding.weight.shape[0] - 1)).clone()
    for line, prompt in enumerate(prompts):
        start = width - lengths[line]
        for piece in prompt:
            if isinstance(piece, Tensor):
                embeds[line, start : start + len(piece)] = piece.to(embeds)
            start += len(piece)
    return tokens.to(sequences.device), mask, {"inputs_embeds": embeds}


Run = tuple[int, int] | list[int]  # of an image: its features' first and last + 1; or text


def mark_images(
    tokens: list[int], image: int | None, placeholders: Sequence[int], sizes: Sequence[int], start: int
) -> list[Run]:
    """A row's prompt cut at its images, the first of its placeholders being number `start` in the batch. Videos are left
    out. sizes: of all images; where one ends and the next follows without text between, they are told apart."""
    ends, found = set(accumulate(sizes)), []
    for kind, group in groupby(tokens, lambda t: t if t in placeholders else None):
        run = list(group)
        if kind is None:
            found.append(run)
        elif kind == image:
            cuts = [start, *(e for e in range(start + 1, start + len(run)) if e in ends), start + len(run)]
            found += pairwise(cuts)
            start += len(run)
    return found


def pieces(runs: Sequence[Run], row: int, view: View, features: Tensor | None) -> list[list[int] | Tensor]:
    """A row's prompt with every image replaced by what `view` makes of it."""
    found: list[list[int] | Tensor] = []
    number = 0
    for run in runs:
        if isinstance(run, list):
            found.append(run)
        elif features is not None:
            found.append(view(row, number, features[run[0] : run[1]]))
            number += 1
    return found
