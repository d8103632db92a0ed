"""The pictures the image sample learns from: 64x64 emoji with a name and a style."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyspec.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which pictures are learnt.

    `path` is a parquet file with the columns `image{bytes}, caption, style, group, subgroup, split`; `groups` and
    `subgroups` (of other groups) are what is kept; captions in `keep_in_train` are trained on whatever their split.
    """

    path: str | None = None
    groups: tuple[str, ...] = (
        "activities",
        "animals-nature",
        "food-drink",
        "objects",
        "smileys-emotion",
        "travel-places",
    )
    subgroups: tuple[str, ...] = ("geometric",)
    keep_in_train: tuple[str, ...] = ("red heart",)
    aliases: Mapping[str, str] = field(default_factory=lambda: {"automobile": "red car", "sun with face": "sun face"})


@dataclass(frozen=True, slots=True)
class Pictures:
    """pixels [N,3,64,64] uint8; captions, styles and groups, N strings each; test [N] bool."""

    pixels: Tensor
    captions: tuple[str, ...]
    styles: tuple[str, ...]
    test: Tensor
    groups: tuple[str, ...] = ()


def read_pictures(data: DataConfig) -> Pictures:
    """The chosen pictures of the parquet file, in file order. Needs pandas, pyarrow and Pillow."""
    import io

    import numpy as np
    import pandas as pd
    from PIL import Image

    if data.path is None:
        raise ConfigError("train.data.path is not set: name the parquet file with the pictures")
    table = pd.read_parquet(data.path)
    table = table.loc[table["group"].isin(data.groups) | table["subgroup"].isin(data.subgroups)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["image"]])
    test = (table["split"] == "test") & ~table["caption"].isin(data.keep_in_train)
    return Pictures(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        captions=tuple(table["caption"]),
        styles=tuple(table["style"]),
        test=torch.from_numpy(test.to_numpy(copy=True)),
        groups=tuple(table["group"]),
    )


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 pixels to float in [-1, 1], the range `JanusImageProcessor` uses with mean and deviation 0.5."""
    return pixels.float() / 127.5 - 1.0
