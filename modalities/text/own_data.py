"""What a text target says by itself, to train draft heads on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from polyspec import pipelines
from polyspec.modalities.text.sample import load_sample
from polyspec.target import make_target
from polyspec.training.data import Corpus, generate_corpus


class DataSource:
    """A causal language model that continues prompts. See `polyspec.training.train` for `settings`."""

    def __init__(self, settings: Mapping[str, Any]):
        from polyspec.training import read_prompts

        self.texts = read_prompts(settings.get("prompts") or "train_chat")
        device = settings.get("device") or pipelines.default_device()
        dtype, name = pipelines.as_dtype(settings.get("dtype"), device), settings.get("target")
        if name is None:
            self.model, self.tokenizer = load_sample(dtype=dtype, device=device)
        else:
            self.tokenizer = pipelines.load(AutoTokenizer.from_pretrained, name)
            self.model = pipelines.load(AutoModelForCausalLM.from_pretrained, name, dtype=dtype).to(device).eval()
        self.target = make_target(self.model)

    def corpus(self, folder: Path, **knobs: Any) -> Corpus:
        """Continuations of the prompts; knobs as for `generate_corpus`."""
        return generate_corpus(self.model, [encode(self.tokenizer, text) for text in self.texts], folder, **knobs)


def encode(tokenizer: Any, text: str) -> list[int]:
    """A prompt's tokens, through the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text)["input_ids"]
