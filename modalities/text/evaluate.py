"""What the text bench needs: prompts, transformers' own generate, and the cost of a target call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyspec.bench.calls import time_calls
from polyspec.prompts import load_prompts
from polyspec.target import make_target


def bench_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts of a file in samples/prompts by its name, or the given list."""
    return load_prompts(prompts) if isinstance(prompts, str) else list(prompts)


def transformers_generate(pipe: Any, prompts: Sequence[str], **arguments: Any) -> int:
    """Answer with plain `generate`; the number of new tokens, padding not counted."""
    inputs = pipe.encode(prompts)
    return count_new(pipe.model, pipe.model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :])


def count_new(model: Any, ids: torch.Tensor) -> int:
    """Tokens of `ids [B, L]` up to and with each row's first end."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=ids.device)
    finished = torch.isin(ids, ends).long().cumsum(1)
    return int(((finished == 0) | ((finished == 1) & torch.isin(ids, ends))).sum())


def call_seconds(pipe: Any, prompts: Sequence[str], sizes: Sequence[int], **arguments: Any) -> dict[int, float]:
    """Median seconds of a target call of N tokens a row, N in `sizes`, behind the prompts; the sizes in turn."""
    inputs = pipe.encode(prompts)
    target = make_target(pipe.model)
    target.prefill(inputs["input_ids"], inputs["attention_mask"], capacity=inputs["input_ids"].shape[1] + max(sizes))
    return time_calls(target, inputs["input_ids"][:, -1:], sizes)
