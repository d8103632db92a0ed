"""The measures of pictures: a classifier that learns, and a distance that is right for Gaussians."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from polyspec.errors import InputError
from polyspec.modalities.image.quality import Labelled, agreement, as_pixels, gaussian_distance, train_classifier


def stripes(count: int, seed: int) -> Labelled:
    """Pictures of vertical (0) and horizontal (1) stripes under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    wave = (torch.arange(64) // 4 % 2 * 120.0).expand(64, 64)
    pixels = torch.stack([wave if label == 0 else wave.T for label in labels])[:, None].expand(-1, 3, -1, -1)
    noise = 100 * torch.rand(count, 3, 64, 64, generator=generator)
    return Labelled((pixels + noise).clamp(0, 255).to(torch.uint8), labels, ("vertical", "horizontal"))


def test_a_classifier_learns_what_tells_groups_apart() -> None:
    model = train_classifier(stripes(64, seed=0), epochs=6, batch=16)
    test = stripes(32, seed=1)
    assert agreement(model, test.pixels, test.labels) > 0.9
    assert agreement(model, test.pixels, 1 - test.labels) < 0.1


def test_the_frechet_distance_is_the_closed_form() -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=(200, 5)) @ random.normal(size=(5, 5))
    b = random.normal(size=(150, 5)) @ random.normal(size=(5, 5)) + 0.3
    mean = a.mean(0) - b.mean(0)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    assert gaussian_distance(a, b) == pytest.approx(mean @ mean + np.trace(ca + cb - 2 * root), rel=1e-6)
    assert gaussian_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_pictures_become_pixels() -> None:
    pixels = as_pixels([Image.new("RGB", (64, 64), (255, 0, 7))] * 2)
    assert pixels.shape == (2, 3, 64, 64) and pixels[1, :, 5, 5].tolist() == [255, 0, 7]


def test_too_little_to_measure_is_refused() -> None:
    with pytest.raises(InputError, match="two groups"):
        train_classifier(Labelled(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), torch.zeros(3).long(), ("one",)))
    with pytest.raises(InputError, match="no picture"):
        agreement(
            train_classifier(stripes(4, 0), epochs=1), torch.zeros(0, 3, 64, 64, dtype=torch.uint8), torch.zeros(0)
        )
