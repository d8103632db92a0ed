"""Stage 4, the language model: codes and phonemes by turns, given the phonemes and codes with mistakes in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from polyspec.errors import ConfigError
from polyspec.modalities.speech.phonemes import Layout
from polyspec.modalities.speech.train.codec import Aligned
from polyspec.training.trainer import Schedule, fit


@dataclass(frozen=True, slots=True)
class LMConfig:
    """Sizes; `corruption`: the highest share of a row's codes that is replaced in its context, `clean`: the share of rows
    where none is; dtype: of the arithmetic."""

    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    corruption: float = 0.4
    clean: float = 0.5
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


def new_model(config: LMConfig, layout: Layout, seed: int = 0) -> LlamaForCausalLM:
    """An untrained model, its weights fixed by `seed`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=layout.size,
            hidden_size=config.hidden_size,
            intermediate_size=round(config.hidden_size * 2.5),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=layout.pad,
            bos_token_id=layout.start,
            eos_token_id=layout.end,
        )
    )
    share_phonemes(model, layout)
    return model


@torch.no_grad()
def share_phonemes(model: LlamaForCausalLM, layout: Layout) -> None:
    """Let a spoken phoneme begin as the text's own, and a vector of its duration: to find where the voice is in the text is
    to look for what has just been spoken, which a model hardly learns where the two are strangers."""
    embedding: Any = model.get_input_embeddings()
    table: Tensor = embedding.weight
    text = table[layout.first_phoneme : layout.first_spoken]
    lasting = 0.3 * text.std() * torch.randn(layout.durations, table.shape[1])
    table[layout.first_spoken :] = (text[:, None] + lasting).flatten(0, 1)


def row_of(found: dict[str, Any], layout: Layout) -> tuple[Tensor, int]:
    """A sentence as tokens and how many of them are its prompt. See `polyspec.modalities.speech.phonemes`."""
    names, durations = found["phonemes"], found["durations"]
    prompt = torch.cat([torch.tensor([layout.start]), names + layout.first_phoneme, torch.tensor([layout.speak])])
    said = torch.empty(len(names) + found["codes"].shape[1], dtype=torch.long)
    at = durations.cumsum(0) - durations + torch.arange(len(names))  # where each phoneme stands
    is_code = torch.ones(len(said), dtype=torch.bool).scatter_(0, at, False)
    said[at] = layout.first_spoken + names * layout.durations + durations - 1
    said[is_code] = found["codes"][0]
    return torch.cat([prompt, said, torch.tensor([layout.end])]), len(prompt)


class Collate:
    """Rows padded on the right: tokens `[B, T]`, context (the same with mistakes), labels (-100 in prompts)."""

    def __init__(self, config: LMConfig, layout: Layout):
        self.config, self.layout = config, layout

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        made = [row_of(r, self.layout) for r in rows]
        tokens = pad_sequence([t for t, _ in made], batch_first=True, padding_value=self.layout.pad)
        prompts = torch.tensor([p for _, p in made])
        lengths = torch.tensor([len(t) for t, _ in made])
        index = torch.arange(tokens.shape[1])
        inside = (index >= prompts[:, None]) & (index < lengths[:, None])
        return {"context": self.corrupt(tokens), "labels": tokens.masked_fill(~inside, -100)}

    def corrupt(self, tokens: Tensor) -> Tensor:
        """Some codes replaced: by any code, or by the code before."""
        rate = self.config.corruption * torch.rand(len(tokens), 1)
        rate = torch.where(torch.rand(len(tokens), 1) < self.config.clean, 0, rate)
        before = tokens.roll(1, dims=1)
        other = torch.where(torch.rand(tokens.shape) < 0.5, torch.randint(self.layout.codes, tokens.shape), before)
        wrong = (torch.rand(tokens.shape) < rate) & (tokens < self.layout.codes) & (other < self.layout.codes)
        return torch.where(wrong, other, tokens)


def train_lm(
    config: LMConfig, layout: Layout, data: Aligned, schedule: Schedule, output: Path
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train the language model, or continue; returns it, and the figures at the end."""
    model = new_model(config, layout, schedule.seed)
    # rows are short: torch's fused attention on a CPU takes a third of a step, most of it on the way back, plain products less
    model.set_attn_implementation("eager")

    def losses(model: LlamaForCausalLM, batch: dict[str, Any]) -> dict[str, Tensor]:
        hidden = model.model(input_ids=batch["context"][:, :-1], use_cache=False).last_hidden_state
        goal = batch["labels"][:, 1:]
        said = goal >= 0  # prompts are given, so the output layer need not see them
        goal = goal[said]
        loss = functional.cross_entropy(model.lm_head(hidden[said]).float(), goal, reduction="none")

        def mean(of: Tensor) -> Tensor:
            return (loss * of).sum() / of.sum().clamp(min=1)

        code = goal < layout.codes
        return {"loss": loss.mean(), "codes": mean(code), "phonemes": mean(~code & (goal != layout.end))}

    figures = fit(
        model, lambda _: losses, data, Collate(config, layout), schedule, output, dtype=getattr(torch, config.dtype)
    )
    return model, figures
