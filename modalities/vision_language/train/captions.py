"""The vision tower's second lessons: what a frozen language model says when it is shown a picture and asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from polyspec.modalities.vision_language.evaluate import Example
from polyspec.modalities.vision_language.train.data import augmented

TITLE = "What is in the picture?"
NAMES = (TITLE, TITLE, "What is this?", "What do you see?", "Name what the picture shows.", "What is in this image?")
KEYWORDS = ("Give keywords for the picture.", "Which words go with the picture?", "List keywords.")
SENTENCES = ("Describe the picture.", "Describe the image.", "What does the picture show?", "Write a caption.")
MOST_KEYWORDS = 4


def ask(example: Example, draw: random.Random) -> tuple[str, str]:
    """A question about a picture and its short answer. One without a name is known by its keywords."""
    keywords = ", ".join(example.keywords[:MOST_KEYWORDS])
    name = example.title or keywords
    kind = draw.random()
    if kind < 0.5 or not keywords:
        return draw.choice(NAMES), name
    if kind < 0.75:
        return draw.choice(KEYWORDS), keywords
    return draw.choice(SENTENCES), f"The picture shows {name}."


class Captions(Dataset[dict[str, Tensor]]):
    """Pictures with a question and its answer as `pixels [3, H, W]`, `tokens [L]`, `labels [L]` (-100 but for answers)."""

    def __init__(self, examples: Sequence[Example], pixels: Tensor, processor: Any, patches: int, seed: int = 0):
        self.examples, self.pixels, self.processor, self.patches = examples, pixels, processor, patches
        self.random = random.Random(seed)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        question, answer = ask(self.examples[item], self.random)
        return {"pixels": self.pixels[item], **self.encode(question, answer)}

    def encode(self, question: str, answer: str) -> dict[str, Tensor]:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        seen = prompt.replace(self.processor.image_token, self.processor.image_token * self.patches)
        asked, said = (
            self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            for text in (seen, answer + "<|im_end|>")
        )
        return {"tokens": torch.cat([asked, said]), "labels": torch.cat([torch.full_like(asked, -100), said])}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows padded on the right, with a mask `[B, L]`; the pictures augmented."""
    tokens = pad_sequence([r["tokens"] for r in rows], batch_first=True)
    lengths = torch.tensor([len(r["tokens"]) for r in rows])
    return {
        "pixels": augmented(torch.stack([r["pixels"] for r in rows])),
        "tokens": tokens,
        "labels": pad_sequence([r["labels"] for r in rows], batch_first=True, padding_value=-100),
        "mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long(),
    }


def caption_loss(language: Any, placeholder: int) -> Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]:
    """Cross-entropy of the answers behind what `Eyes` make of the pictures, through a frozen language model."""

    def losses(eyes: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features = eyes(batch["pixels"]).flatten(0, 1)
        embeds = language.get_input_embeddings()(batch["tokens"])
        at = (batch["tokens"] == placeholder)[..., None]
        embeds = embeds.masked_scatter(at, features.to(embeds.dtype))
        hidden = language.model(inputs_embeds=embeds, attention_mask=batch["mask"], use_cache=False).last_hidden_state
        labels = batch["labels"][:, 1:]
        answered = labels != -100  # the output layer is the dearest: only where it counts
        logits = language.lm_head(hidden[:, :-1][answered]).float()
        right = (logits.argmax(-1) == labels[answered]).float().mean()
        return {"loss": functional.cross_entropy(logits, labels[answered]), "accuracy": right}

    return losses
