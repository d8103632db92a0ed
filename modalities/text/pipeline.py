"""Text to text, with any causal language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyspec import pipelines
from polyspec.api import CustomGenerate
from polyspec.errors import ConfigError, InputError
from polyspec.modalities.text.sample import cache_folder, load_sample
from polyspec.outputs import Result

DEFAULT_RECIPE = "prompt_lookup"
SAMPLE = "smollm2-135m-instruct"


class Pipeline:
    """Answers prompts with a causal language model. See `polyspec.pipeline` for the arguments.

    target: a folder or hub id, or a (model, tokenizer) pair. Prompts go through the tokenizer's chat template if it
    has one.
    """

    def __init__(
        self,
        *,
        target: Any = None,
        recipe: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        sample = SAMPLE if pipelines.is_from(target, cache_folder()) else None
        self.method = pipelines.choose("text", recipe, DEFAULT_RECIPE, overrides, sample)
        device = device or pipelines.default_device()
        if isinstance(target, tuple):
            model, tokenizer = target
        elif target is None:
            model, tokenizer = load_sample(dtype=pipelines.as_dtype(dtype, device), device=device)
        else:
            tokenizer = pipelines.load(AutoTokenizer.from_pretrained, target, padding_side="left")
            load = AutoModelForCausalLM.from_pretrained
            model = pipelines.load(load, target, dtype=pipelines.as_dtype(dtype, device)).to(device).eval()
        self.model: Any = model
        self.tokenizer: Any = tokenizer

    def encode(self, prompts: Sequence[str]) -> Any:
        """Prompts as left-padded `input_ids` and `attention_mask` on the model's device."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template:
            prompts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
                )
                for p in prompts
            ]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(self.model.device)

    @property
    def loaded(self) -> tuple[Any, Any]:
        """What another pipeline takes as `target`, to share it."""
        return self.model, self.tokenizer

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        seed: int | Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        streamer: Any = None,
        **sampling: Any,
    ) -> Result:
        """Continue each prompt by at most `max_new_tokens`; `outputs` holds strings.

        sampling: any argument of `generate` (do_sample, temperature, top_k, top_p, guidance_scale, …).
        progress: called with the number of new token positions.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise InputError("the prompt is empty; say something")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be ≥ 1, got {max_new_tokens}")
        inputs = self.encode(prompts)
        if progress is not None and streamer is None:
            streamer = ProgressStreamer(progress)
        fast = CustomGenerate(self.method, seed=seed, streamer=streamer)
        knobs = {k: v for k, v in sampling.items() if v is not None}
        ids = self.model.generate(**inputs, custom_generate=fast, max_new_tokens=max_new_tokens, **knobs)
        texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return Result(texts, fast.stats)


class ProgressStreamer:
    """A transformers streamer that only counts."""

    def __init__(self, progress: Callable[[int], None]):
        self.progress = progress

    def put(self, tokens: torch.Tensor) -> None:
        self.progress(1)

    def end(self) -> None:
        pass
