"""`polyspec modality=revision target=<T5 or BART> prompt="..."`."""

from dataclasses import replace

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from polyspec import pipelines
from polyspec.api import CustomGenerate
from polyspec.errors import ConfigError
from polyspec.outputs import Result


class Pipeline:
    def __init__(self, *, target=None, recipe=None, overrides=None, device=None, dtype=None):
        if target is None:
            raise ConfigError("name a model that revises texts: target=<folder or hub id>")
        self.method = pipelines.choose("revision", recipe, "aggressive", overrides)
        device = device or pipelines.default_device()
        self.tokenizer = pipelines.load(AutoTokenizer.from_pretrained, target)
        model = pipelines.load(AutoModelForSeq2SeqLM.from_pretrained, target, dtype=pipelines.as_dtype(dtype, device))
        self.model = model.to(device).eval()

    def __call__(self, prompt, *, max_new_tokens=256, seed=None, progress=None, **sampling):
        inputs = self.tokenizer([prompt] if isinstance(prompt, str) else prompt, return_tensors="pt", padding=True)
        sources = [ids[mask.bool()].tolist() for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)]

        def drafter():
            made = self.method.drafter()
            made.sources = sources
            return made

        fast = CustomGenerate(replace(self.method, drafter=drafter), seed=seed)
        inputs = {k: v.to(self.model.device) for k, v in inputs.items() if k != "token_type_ids"}
        ids = self.model.generate(**inputs, custom_generate=fast, max_new_tokens=max_new_tokens, **sampling)
        return Result(self.tokenizer.batch_decode(ids, skip_special_tokens=True), fast.stats)
