"""Semantic IDs: items as short tuples of codes, similar items sharing their first ones.

After TIGER (Recommender Systems with Generative Retrieval), 2305.05065, with residual k-means in place of a trained RQ-VAE
(as in OneRec and others): level d clusters what levels 1 … d-1 leave of the embeddings,

    r_1 = x,    c_d = argmin_j |r_d - e_dj|,    r_{d+1} = r_d - e_{d c_d},

and a last digit tells apart items whose codes are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.lengths import positive


@dataclass(frozen=True, slots=True, eq=False)
class ResidualQuantiser:
    """codebooks `[D, C, d]` float32: C centres for each of D levels."""

    codebooks: Tensor

    @classmethod
    def fit(
        cls, embeddings: Tensor, levels: int = 3, codes: int = 256, *, iterations: int = 25, seed: int = 0
    ) -> ResidualQuantiser:
        """Residual k-means of `embeddings [I, d]`: `levels` times, `codes` centres each (never more than there are
        different residuals). The same seed gives the same codes. InputError for what are no finite embeddings, ConfigError
        for levels, codes or iterations < 1."""
        residual = checked(embeddings).clone()
        for name, value in (("levels", levels), ("codes", codes), ("iterations", iterations)):
            positive(name, value)
        generator = torch.Generator(residual.device).manual_seed(seed)
        codebooks = []
        for _ in range(levels):
            centres = k_means(residual, codes, iterations, generator)
            residual -= centres[nearest(residual, centres)]
            codebooks.append(torch.nn.functional.pad(centres, (0, 0, 0, codes - len(centres)), value=torch.inf))
        return cls(torch.stack(codebooks))

    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes `[I, D]` long of `embeddings [I, d]`, of items new or old."""
        residual = checked(embeddings).clone()
        if residual.shape[1] != self.codebooks.shape[2]:
            raise InputError(f"embeddings have {residual.shape[1]} dimensions, the codebooks {self.codebooks.shape[2]}")
        codes = []
        for book in self.codebooks:
            centres = book[book.isfinite().all(1)]
            codes.append(nearest(residual, centres))
            residual -= centres[codes[-1]]
        return torch.stack(codes, dim=1)


def checked(embeddings: Tensor) -> Tensor:
    """`embeddings [I, d]` as float32; InputError if they are none."""
    if embeddings.ndim != 2 or 0 in embeddings.shape or not bool(embeddings.isfinite().all()):
        raise InputError(f"embeddings must be finite [items, dimensions], neither empty; got {list(embeddings.shape)}")
    return embeddings.float()


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index `[I]` of the centre `[C, d]` nearest to each of `points [I, d]`."""
    distance = (centres**2).sum(1) - 2 * points @ centres.T
    return distance.argmin(1)


def k_means(points: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """At most `count` centres of `points [I, d]`, `[C, d]`. A centre that loses its points starts again from the point
    that is farthest from its own."""
    distinct = points.unique(dim=0)
    count = min(count, len(distinct))
    chosen = torch.randperm(len(distinct), generator=generator, device=points.device)[:count]
    centres = distinct[chosen]
    for _ in range(iterations):
        own = nearest(points, centres)
        sizes = own.bincount(minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, own, points)
        moved = sums / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            far = ((points - centres[own]) ** 2).sum(1).argsort(descending=True)
            moved[empty] = points[far[: len(empty)]]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def with_digit(codes: np.ndarray) -> np.ndarray:
    """Codes `[I, D]` with a last digit `[I, D+1]`: 0 for the first item of its codes, 1 for the second, …; so that every
    item's are its own."""
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group))[:-1]])
    digit = np.empty(len(codes), np.int64)
    digit[order] = np.arange(len(codes)) - starts[group[order]]
    return np.concatenate([codes, digit[:, None]], axis=1)


def as_tokens(codes: np.ndarray, sizes: list[int], first: int) -> np.ndarray:
    """Token ids `[I, D]` of codes `[I, D]`: every level has tokens of its own, `sizes[d]` of them, from `first` on.
    InputError for a code outside its level."""
    if codes.shape[1] != len(sizes) or (codes < 0).any() or (codes >= np.asarray(sizes)).any():
        raise InputError(f"codes [{codes.shape[0]}, {codes.shape[1]}] do not fit levels of {sizes} codes")
    return codes.astype(np.int64) + first + np.concatenate([[0], np.cumsum(sizes)[:-1]])
