"""A tiny Llama with the target's tokenizer, to be distilled into a draft model for any recipe that needs one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from polyspec.errors import ConfigError
from polyspec.target import Target, make_target


def tiny_llama(
    target: Target | PreTrainedModel,
    *,
    layers: int = 2,
    hidden_size: int = 128,
    heads: int = 4,
    seed: int = 0,
    vocabulary: None = None,
) -> LlamaForCausalLM:
    """An untrained Llama, its embedding tied to its output layer and started from the principal components of the
    target's: with a vocabulary of tens of thousands that is most of a small model. Float32 on the CPU."""
    if hidden_size % heads:
        raise ConfigError(f"{heads} heads do not divide a width of {hidden_size}")
    target = make_target(target) if isinstance(target, PreTrainedModel) else target
    theirs = target.config
    config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=theirs.max_position_embeddings,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        pad_token_id=theirs.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    theirs_table: Any = target.model.get_input_embeddings().weight
    components = principal_components(theirs_table[: target.vocab_size], hidden_size)
    table: Any = model.get_input_embeddings().weight
    with torch.no_grad():
        table[:, : components.shape[1]] = components * config.initializer_range
    return model.eval()


def principal_components(table: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of `table [V, d]` along its `count` widest directions, each of variance 1: `[V, min(count, d)]`."""
    table = table.detach().float().cpu()
    table = table - table.mean(0)
    _, directions = torch.linalg.eigh(table.T @ table)
    projected = table @ directions.flip(1)[:, :count]
    return projected / projected.std(0).clamp(min=1e-6)
