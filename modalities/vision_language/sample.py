"""The vision-language sample: SmolLM2-135M-Instruct with a small vision tower and a projector trained for it.

Shipped are the tower and the projector alone (`Eyes`); the language model comes as the text sample's does. Together they
are an ordinary `LlavaForConditionalGeneration` with a `LlavaProcessor`. The placeholder of an image is a control token
that SmolLM2 has and does not use in chats, so the vocabulary, and every drafter for it, stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    SiglipImageProcessorPil,
)
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector

from polyspec.errors import CheckpointError
from polyspec.files import shipped
from polyspec.modalities.text.sample import cache_folder, fetch_sample
from polyspec.pipelines import load

PLACEHOLDER = "<jupyter_output>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + PLACEHOLDER + "\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class EyesConfig(LlavaConfig):
    """A LLaVA's configuration, of which the folder holds the vision tower and the projector."""

    model_type = "polyspec_eyes"


class Eyes(PreTrainedModel):
    """A LLaVA's vision tower and projector: pixels `[n, 3, H, W]` to language-model embeddings `[n, patches, d]`."""

    config_class: ClassVar[type[EyesConfig]] = EyesConfig
    config: EyesConfig
    base_model_prefix = "eyes"

    def __init__(self, config: EyesConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        seen: Any = LlavaModel.get_image_features(self, pixel_values=pixel_values, return_dict=True)  # type: ignore[arg-type]
        return torch.stack(list(seen.pooler_output))


def sample_folder() -> Path:
    """Where the shipped vision tower and projector are."""
    return shipped("llava-smollm2")


def is_sample(folder: Any) -> bool:
    """Whether `folder` holds a vision tower and projector, as training leaves them, and no language model."""
    path = Path(str(folder)) / "config.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("model_type") == EyesConfig.model_type


def load_sample(
    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", folder: str | Path | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The sample in eval mode and its processor. folder: a vision tower and projector of your own; by default the shipped.

    Raises CheckpointError: there are none, or the language model cannot be fetched.
    """
    folder = Path(folder or sample_folder())
    if not is_sample(folder):
        raise CheckpointError(
            f"{folder} holds no vision tower; train one with polyspec task=train modality=vision_language, or name a model "
            "with target=…"
        )
    eyes: Eyes = load(Eyes.from_pretrained, folder, dtype=torch.float32)
    return assemble(eyes, fetch_sample(), dtype, device)


def assemble(
    eyes: Eyes, language_folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of the language model in `language_folder` and `eyes`, and its processor."""
    language = load(AutoModelForCausalLM.from_pretrained, language_folder, dtype=dtype)
    made_for, width = eyes.config.text_config.hidden_size, language.config.hidden_size  # type: ignore[union-attr]
    if made_for != width:
        raise CheckpointError(
            f"this vision tower was trained for a language model of width {made_for}, {language_folder} has {width}; "
            "train one for it with polyspec task=train modality=vision_language"
        )
    fields = {k: v for k, v in eyes.config.to_dict().items() if k not in ("model_type", "text_config", "architectures")}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**{**fields, "text_config": language.config}))
    inner = model.model
    inner.vision_tower, inner.multi_modal_projector = eyes.vision_tower, eyes.multi_modal_projector
    inner.language_model, model.lm_head = language.model, language.lm_head
    model.generation_config = language.generation_config
    model.name_or_path = eyes.name_or_path
    return model.to(device=device, dtype=dtype).eval(), make_processor(eyes.config, language_folder)  # type: ignore[call-overload]


def assembled_folder(folder: str | Path | None = None) -> Path:
    """The sample as an ordinary LLaVA, 280 MB, for `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor` of
    plain transformers; made when first asked for, beside the language model in its cache and in its dtype.

    folder: as for `load_sample`. Raises CheckpointError, also where the cache cannot be written."""
    folder = Path(folder or sample_folder())
    kept = load(AutoConfig.from_pretrained, fetch_sample()).dtype or torch.float32
    model, processor = load_sample(kept, folder=folder)
    with open(folder / "model.safetensors", "rb") as file:
        mark = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    whole = cache_folder().with_name(f"{folder.name}-{mark}")
    staging = whole.with_name(whole.name + ".partial")
    try:
        with FileLock(whole.with_name(whole.name + ".lock")):
            if not (whole / "config.json").is_file():
                shutil.rmtree(staging, ignore_errors=True)
                model.save_pretrained(staging)
                processor.save_pretrained(staging)
                staging.replace(whole)
    except OSError as error:
        raise CheckpointError(
            f"cannot store the assembled model in {whole} ({error}); make room there or set POLYSPEC_CACHE elsewhere"
        ) from error
    return whole


def make_processor(config: EyesConfig, language_folder: Path) -> LlavaProcessor:
    """Pictures at the tower's size, prompts with a placeholder for every patch."""
    vision: Any = config.vision_config
    tokenizer = load(AutoTokenizer.from_pretrained, language_folder, padding_side="left")
    pictures = SiglipImageProcessorPil(size={"height": vision.image_size, "width": vision.image_size})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=vision.image_size // math.isqrt(config.image_seq_length),  # a token's side, in pixels
        vision_feature_select_strategy="full",
        image_token=PLACEHOLDER,
        chat_template=TEMPLATE,
    )
