"""Questions about images, with any vision-language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from os import PathLike
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

from polyspec import pipelines
from polyspec.api import CustomGenerate
from polyspec.errors import ConfigError, InputError
from polyspec.modalities.text.pipeline import ProgressStreamer
from polyspec.modalities.vision_language.images import content, images_of_prompts
from polyspec.modalities.vision_language.sample import is_sample, load_sample, sample_folder
from polyspec.outputs import Result

DEFAULT_RECIPE = "prompt_lookup"
SAMPLE = "smollm2-135m-instruct"  # its language model, for which drafters are shipped
CAPTION, CAPTION_TOKENS = "What is in the picture?", 24  # asked of a target that captions for its own drafter
KEPT_CAPTIONS = 4096  # before they are made anew


def fingerprint(picture: Image.Image) -> bytes:
    return sha256(repr((picture.mode, picture.size)).encode() + picture.tobytes()).digest()


class Pipeline:
    """Answers prompts about images. See `polyspec.pipeline` for the arguments.

    target: a folder or hub id, or a (model, processor) pair. Prompts go through the processor's chat template if it has
    one. Among the overrides of `ibed` and `tabed`, captioner may be a callable PIL image -> caption, or "target": the
    target itself, asked once for every picture.
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
        overrides = dict(overrides or {})
        captioner: Any = overrides.get("captioner")
        if captioner is not None and captioner != "target" and not callable(captioner):
            raise ConfigError(f'captioner must be a callable PIL image -> caption, or "target", got {captioner!r}')
        own: Callable[[Image.Image], str] = self.own_caption
        self.captioner = own if captioner == "target" else captioner
        self.captions: dict[bytes, list[int]] = {}
        if self.captioner is not None:
            overrides["captioner"] = self.caption
        known = pipelines.is_from(target, sample_folder()) or (not isinstance(target, tuple) and is_sample(target))
        self.sample = SAMPLE if known else None
        self.method = pipelines.choose("vision_language", recipe, DEFAULT_RECIPE, overrides, self.sample)
        device = device or pipelines.default_device()
        kind = pipelines.as_dtype(dtype, device)
        if isinstance(target, tuple):
            model, processor = target
        elif target is None or is_sample(target):
            model, processor = load_sample(dtype=kind, device=device, folder=target)
        else:
            processor = pipelines.load(AutoProcessor.from_pretrained, target)
            model = pipelines.load(AutoModelForImageTextToText.from_pretrained, target, dtype=kind).to(device).eval()
        self.model: Any = model
        self.processor: Any = processor
        self.pictures: list[list[Image.Image]] = []

    @property
    def loaded(self) -> tuple[Any, Any]:
        """What another pipeline takes as `target`, to share it."""
        return self.model, self.processor

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def streamer(self) -> TextStreamer:
        """Prints an answer while it is written; for a single prompt."""
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def caption(self, row: int, number: int) -> list[int]:
        """The tokens of the caption of a row's image."""
        return self.captions[fingerprint(self.pictures[row][number])]

    def describe(self, pictures: Sequence[Sequence[Image.Image]]) -> None:
        """Have the captioner caption what it has not yet, and keep the captions' tokens."""
        assert self.captioner is not None
        if len(self.captions) > KEPT_CAPTIONS:
            self.captions.clear()
        for picture in (one for own in pictures for one in own):
            key = fingerprint(picture)
            if key not in self.captions:
                said = self.captioner(picture)
                self.captions[key] = self.tokenizer(said, add_special_tokens=False)["input_ids"]

    def own_caption(self, picture: Image.Image) -> str:
        """What the target says is in the picture."""
        inputs = self.encode([CAPTION], [[picture]])
        ids = self.model.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False)
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def encode(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Any:
        """Prompts and their pictures as the model's inputs, padded on the left, on its device."""
        placeholder = getattr(self.processor, "image_token", None)
        parts = [content(p, own, placeholder) for p, own in zip(prompts, pictures, strict=True)]
        if getattr(self.processor, "chat_template", None):
            texts = [
                self.processor.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True)
                for c in parts
            ]
        else:
            if placeholder is None and any(pictures):
                raise InputError(f"{type(self.processor).__name__} has neither a chat template nor an image token")
            texts = ["".join(c.get("text", str(placeholder)) for c in part) for part in parts]
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"
        images = [list(own) for own in pictures] if any(pictures) else None
        try:
            inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        except (ValueError, IndexError, StopIteration) as error:
            raise InputError(f"the images and the prompt's placeholders do not match: {error}") from error
        floats = {k: v.to(self.model.dtype) for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
        return {k: floats.get(k, v).to(self.model.device) for k, v in inputs.items() if torch.is_tensor(v)}

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Image.Image | str | PathLike[str] | Sequence[Any] | None = None,
        *,
        max_new_tokens: int = 128,
        seed: int | Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        streamer: Any = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        **knobs: Any,
    ) -> Result:
        """Answer each prompt with at most `max_new_tokens`; `outputs` holds strings.

        image: a picture or its path, for all prompts; a list, for a single prompt; or for several prompts a list with an
        entry (None, a picture or a list) each. knobs: further arguments of `generate`. progress: called with the number
        of new token positions. Raises InputError for pictures that cannot be read or do not fit the prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise InputError("the prompt is empty; ask something")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be ≥ 1, got {max_new_tokens}")
        self.pictures = images_of_prompts(image, len(prompts))
        inputs = self.encode(prompts, self.pictures)
        if self.captioner is not None:
            self.describe(self.pictures)
        if progress is not None and streamer is None:
            streamer = ProgressStreamer(progress)
        fast = CustomGenerate(self.method, seed=seed, streamer=streamer)
        sampling = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, **knobs}
        given = {k: v for k, v in sampling.items() if v is not None}
        ids = self.model.generate(**inputs, custom_generate=fast, max_new_tokens=max_new_tokens, **given)
        texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return Result(texts, fast.stats)
