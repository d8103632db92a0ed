"""A vision tower's first lessons, without the language model: which words go with a picture.

What the projector makes of a picture is to lie near the language model's own embeddings of the words that describe it, so
that the language model can read it from the start. A step costs a hundredth of one through the language model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from polyspec.modalities.vision_language.evaluate import Example, words
from polyspec.modalities.vision_language.sample import Eyes, EyesConfig
from polyspec.modalities.vision_language.train.data import augmented, mixing, rarity


def words_of(example: Example) -> set[str]:
    """All that a picture is called."""
    return words(" ".join((example.title, *example.keywords)))


def vocabulary(examples: Sequence[Example], least: int = 4) -> dict[str, int]:
    """How many pictures go with each word that goes with at least `least`; the commonest first."""
    counts = Counter(word for e in examples for word in words_of(e))
    return {word: n for word, n in counts.most_common() if n >= least}


def word_table(known: Sequence[str], tokenizer: Any, embeddings: Tensor) -> Tensor:
    """The mean of the embeddings `[V, d]` of each word's tokens, as it stands inside a sentence: `[words, d]`."""
    ids = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in known]
    return torch.stack([embeddings[torch.tensor(own)].float().mean(0) for own in ids])


class WordEyes(PreTrainedModel):
    """Eyes, and how their tokens are compared with words: `[B, 3, H, W]` to log-odds `[B, words]`.

    logit_w = log Σ_i exp(s·cos(z_i − c, e_w − c)) + b_w, for tokens z_i, embeddings e_w and c their mean: a word is there
    if some token says it."""

    config_class: ClassVar[type[EyesConfig]] = EyesConfig
    base_model_prefix = "eyes"
    centre: Tensor
    table: Tensor

    def __init__(self, config: EyesConfig, table: Tensor):
        super().__init__(config)
        self.eyes = Eyes(config)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.zeros(len(table)))
        centre = table.mean(0)
        self.register_buffer("centre", centre, persistent=False)
        self.register_buffer("table", functional.normalize(table - centre, dim=-1), persistent=False)
        self.length = float((table - centre).norm(dim=-1).mean())
        self.post_init()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.eyes(pixels).float() - self.centre
        near = torch.logsumexp(self.scale * functional.normalize(seen, dim=-1) @ self.table.T, dim=1)
        return near + self.bias, seen.norm(dim=-1) / self.length


class Labelled(Dataset[dict[str, Tensor]]):
    """Pictures `pixels [3, H, W]` and the share of each known word in what they are called, `target [words]`: rare words
    count more. Pictures without a known word are left out."""

    def __init__(self, examples: Sequence[Example], pixels: Tensor, known: Mapping[str, int]):
        place = {word: number for number, word in enumerate(known)}
        weight = rarity(list(known.values()))
        self.rows = [
            (i, at) for i, e in enumerate(examples) if (at := sorted(place[w] for w in words_of(e) if w in place))
        ]
        self.pixels, self.weight = pixels, torch.tensor(weight)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        i, at = self.rows[item]
        target = torch.zeros_like(self.weight)
        target[at] = self.weight[at] / self.weight[at].sum()
        return {"pixels": self.pixels[i], "target": target}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, augmented, half of it mixed with other pictures (mixup)."""
    pixels, target = augmented(torch.stack([r["pixels"] for r in rows])), torch.stack([r["target"] for r in rows])
    partner, own = mixing(len(rows))
    return {
        "pixels": torch.lerp(pixels[partner], pixels, own[:, None, None, None]),
        "target": torch.lerp(target[partner], target, own[:, None]),
    }


def word_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy with the words of each picture; and tokens of about the length of the words' embeddings."""
    logits, length = model(batch["pixels"])
    found = functional.cross_entropy(logits, batch["target"])
    first = batch["target"].gather(1, logits.argmax(1, keepdim=True)) > 0
    return {"loss": found + 0.1 * (length - 1).square().mean(), "named": first.float().mean()}


@torch.no_grad()
def named(model: Callable[..., Any], data: Labelled, batch: int = 64) -> float:
    """The share of pictures whose likeliest word goes with them."""
    right = 0.0
    for start in range(0, len(data), batch):
        rows = [data[i] for i in range(start, min(start + batch, len(data)))]
        logits, _ = model(torch.stack([r["pixels"] for r in rows]).float())
        target = torch.stack([r["target"] for r in rows])
        right += float((target.gather(1, logits.argmax(1, keepdim=True)) > 0).sum())
    return right / len(data)
