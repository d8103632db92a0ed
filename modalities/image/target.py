"""Autoregressive text-to-image models of transformers behind the Target seam.

An `Adapter` is all that the pipeline knows of a kind of model: how it is loaded, how a prompt becomes token ids, how
many image tokens follow and which of them are allowed where, how they become pictures, and how it samples by default.

Token ids are an adapter's own. Those that can be drawn come first, 0 … vocab_size - 1: the codebook's entries in their
order, then what else stands in a picture, the ends of its lines say. Text tokens follow, i being vocab_size + i. So the
distributions are as small as they can be, and a token alone says how it is embedded, to the target and to a drafter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import embedding, normalize
from transformers import PreTrainedModel

from polyspec.distributions import Constraint
from polyspec.drafting.lean import Frozen
from polyspec.errors import CheckpointError, ConfigError, unknown
from polyspec.guidance import Guidance, guide_logits
from polyspec.laid_out import derived
from polyspec.modalities.image.codebook import neighbour_table
from polyspec.modalities.image.output_rows import OutputRows
from polyspec.target import Target


class ImageTarget(Target):
    """A target whose tokens, the first of them at least, are entries of a codebook."""

    model: Any  # one of transformers' image models: their common base has none of what is used here

    @property
    def codes(self) -> Tensor:
        """The codebook `[C, d]`, C ≤ V, as the model measures distances in it."""
        raise NotImplementedError

    @property
    def codebook(self) -> Tensor:
        """What tokens stand for `[V, d]`; those that are no codes are infinitely far from all others."""
        codes = self.codes
        return torch.cat([codes, codes.new_full((self.vocab_size - len(codes), codes.shape[1]), torch.inf)])

    @property
    def neighbours(self) -> Tensor:
        """Every token's nearest others in the codebook `[V, k]`, nearest first; those that are no codes have themselves,
        which no rule counts."""
        table = neighbour_table(self.model, self.codes)
        others = torch.arange(len(table), self.vocab_size, device=table.device)
        return torch.cat([table, others[:, None].expand(-1, table.shape[1])])


class Adapter(ImageTarget):
    """Base of the models that the pipeline draws with. Call `encode` before anything else; it says what is drawn.

    guidance_scale: 1 for no guidance.
    """

    loads: ClassVar[str]
    """The transformers class of a checkpoint."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Sampling knobs where a checkpoint's generation config has none."""
    any_size: ClassVar[bool] = False
    """Whether pictures may have another size than the model's own."""

    image_tokens: int
    """How many tokens follow a prompt."""
    constraint: Constraint | None = None
    """Which of them may stand where."""
    output_layer: Callable[[Tensor], Tensor]
    """Last hidden states `[.., d]` to logits `[.., V]`."""

    def __init__(self, model: PreTrainedModel, guidance_scale: float = 1.0):
        super().__init__(model)
        self.guidance_scale = guidance_scale

    @property
    def backbone(self) -> Any:
        """The decoder between `embed` and `output_layer`."""
        return self.model.get_decoder()

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `[..]` to the backbone's inputs `[.., d]`."""
        raise NotImplementedError

    def encode(
        self, processor: Any, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prompts as (token ids `[B, P]`, mask `[B, P]`, 1 = token), padded on the left; sets `guidance`, `image_tokens`,
        `row_width` and `constraint`. size: height and width in pixels, by default the model's own; ConfigError if it
        cannot draw that."""
        raise NotImplementedError

    def pictures(self, processor: Any, tokens: Tensor) -> list[Image.Image]:
        """Image tokens `[B, image_tokens]` as pictures."""
        raise NotImplementedError

    def generate(
        self, processor: Any, prompts: Sequence[str], size: tuple[int, int] | None = None, **knobs: Any
    ) -> Tensor:
        """Image tokens `[B, image_tokens]` as transformers' own `generate` draws them, with its sampling `knobs`: what
        recipes are compared with."""
        raise NotImplementedError

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        out = self.backbone(
            inputs_embeds=self.embed(tokens),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(self.hidden_layers),
        )
        return self.output_layer(out.last_hidden_state) if keep_logits else None, out.hidden_states


class JanusTarget(Adapter):
    """Janus and Janus-Pro of any size: image tokens have an embedding and an output head of their own.

    A prompt ends with the begin-of-image token; everything behind it is an image token. The unconditional prompt is
    the same prompt with all text replaced by the pad token, as in the model's own `generate`.
    """

    loads = "JanusForConditionalGeneration"
    defaults: ClassVar[Mapping[str, Any]] = {"guidance_scale": 5.0}

    def __init__(self, model: PreTrainedModel, guidance_scale: float = 1.0):
        super().__init__(model, guidance_scale)
        self.image_tokens = self.model.model.vision_model.config.num_image_tokens
        self.row_width = math.isqrt(self.image_tokens)

    @cached_property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.model.config.vq_config.num_embeddings

    @property
    def codes(self) -> Tensor:
        return normalize(self.model.model.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)

    @property
    def backbone(self) -> Any:
        return self.model.model.language_model

    @cached_property
    def output_layer(self) -> Frozen:  # type: ignore[override]
        head = self.model.model.generation_head
        return derived(head, "frozen", lambda: Frozen(head.proj_out, head.activation_fn, head.vision_head))

    @cached_property
    def code_embeddings(self) -> Tensor:
        """What every code becomes for the backbone `[V, d]`."""
        inner, every = self.model.model, torch.arange(self.vocab_size, device=self.device)
        prepare = self.model.prepare_embeddings_for_image_generation
        with torch.no_grad():
            return derived(inner.generation_aligner, "codes", lambda: prepare(every), inner.generation_embeddings.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        image = embedding(tokens.clamp(max=self.vocab_size - 1), self.code_embeddings)
        text = self.model.get_input_embeddings()((tokens - self.vocab_size).clamp(min=0))
        return torch.where((tokens < self.vocab_size)[..., None], image, text)

    def encode(
        self, processor: Any, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        assert self.row_width is not None
        side = self.row_width * 2 ** (len(self.model.config.vq_config.channel_multiplier) - 1)
        if size is not None and tuple(size) != (side, side):
            raise ConfigError(f"size={list(size)}: this model draws {side}×{side} pixels; leave size out")
        inputs = processor(text=list(prompts), generation_mode="image", padding=True, return_tensors="pt")
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        if self.guidance_scale > 1:
            config = self.model.generation_config
            kept = (ids == config.bos_token_id) | (ids == config.generation_kwargs["boi_token_id"])
            unconditional = torch.where(kept, ids, config.pad_token_id) + self.vocab_size
            self.guidance = Guidance(self.guidance_scale, unconditional, mask, guide_logits)
        return ids + self.vocab_size, mask

    def pictures(self, processor: Any, tokens: Tensor) -> list[Image.Image]:
        # one by one: the same tokens give the same pixels however many pictures are drawn together
        return [to_images(self.model.decode_image_tokens(row).float())[0] for row in tokens.split(1)]

    def generate(
        self, processor: Any, prompts: Sequence[str], size: tuple[int, int] | None = None, **knobs: Any
    ) -> Tensor:
        inputs = processor(text=list(prompts), generation_mode="image", padding=True, return_tensors="pt")
        # it fails without guidance: a scale that is 1 to six digits gives the same picture
        knobs["guidance_scale"] = max(self.guidance_scale, 1.000001)
        return self.model.generate(**inputs.to(self.device), generation_mode="image", **knobs)


class Emu3Target(Adapter):
    """Emu3-Gen: image tokens among the text tokens of one vocabulary, a picture being

        (w codes, end of line) × h, end of frame, end of image, end of text

    in which only the codes are drawn: the constraint forces the rest. The unconditional prompt is `negative_prompt`, in
    the same form as the prompt.
    """

    loads = "Emu3ForConditionalGeneration"
    defaults: ClassVar[Mapping[str, Any]] = {"do_sample": True, "top_k": 2048, "guidance_scale": 3.0}
    any_size = True

    negative_prompt = (
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
        "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    """What Emu3's authors guide away from."""

    def __init__(self, model: PreTrainedModel, guidance_scale: float = 1.0):
        super().__init__(model, guidance_scale)
        known, codes = self.model.config.vocabulary_map or {}, self.model.config.vq_config.codebook_size
        ends = [known.get(name) for name in ("<|extra_200|>", "<|extra_201|>", "<|image end|>")]
        eos = self.config.eos_token_id
        visual = self.model.vocabulary_mapping.img2bpe if known else {}
        if None in ends or sorted(visual) != list(range(codes)):
            raise CheckpointError(
                f"the vocabulary_map in {model.name_or_path or 'the model'}'s config names {len(visual)} visual tokens, "
                f"for a codebook of {codes}, and ends of line, frame and image {ends}; save it with the whole map of its "
                "tokenizer, as Emu3-Gen-hf has it"
            )
        drawn = [visual[code] for code in range(codes)] + [*ends, eos[0] if isinstance(eos, list) else eos]
        self.ids = torch.cat([torch.tensor(drawn), torch.arange(self.config.vocab_size)]).to(self.device)
        """The model's ids of our tokens, `[V + its vocabulary]`."""
        self.drawn, self.code_count = len(drawn), codes
        self.output_layer = OutputRows(self.model.lm_head, drawn)

    @property
    def vocab_size(self) -> int:
        return self.drawn

    @property
    def codes(self) -> Tensor:
        return self.model.model.vqmodel.quantize.embedding.weight.detach().float()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(self.ids[tokens])

    def encode(
        self, processor: Any, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        form = {"return_for_image_generation": True, "padding": True, "padding_side": "left", "return_tensors": "pt"}
        if size is not None:
            height, width = size
            patch = processor.downsample_ratio
            if height < patch or width < patch or height % patch or width % patch:
                raise ConfigError(f"size={list(size)}: height and width must be multiples of {patch} pixels")
            form |= {"ratio": f"{width}:{height}", "image_area": width * height}
        inputs = processor(text=list(prompts), **form)
        self.lines, self.columns = (int(n) for n in inputs["image_sizes"][0])
        self.row_width = self.columns + 1
        self.image_tokens = self.lines * self.row_width + 3
        self.constraint = self.allowed()
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        if self.guidance_scale > 1:
            other = processor(text=[self.negative_prompt] * len(prompts), **form)
            tokens = other["input_ids"].to(self.device) + self.vocab_size
            self.guidance = Guidance(self.guidance_scale, tokens, other["attention_mask"].to(self.device), guide_logits)
        return ids + self.vocab_size, mask

    def allowed(self) -> Constraint:
        """A code or the end of the line, and at last the three ends, all forced but the codes."""
        ends = self.vocab_size - self.code_count
        sets = torch.zeros(1 + ends, self.vocab_size, dtype=torch.bool)
        sets[0, : self.code_count] = True
        sets[1:, self.code_count :] = torch.eye(ends, dtype=torch.bool)
        kinds = torch.tensor([*([0] * self.columns + [1]) * self.lines, *range(2, ends + 1)])
        return Constraint(sets.to(self.device), kinds.to(self.device))

    def pictures(self, processor: Any, tokens: Tensor) -> list[Image.Image]:
        size = {"height": self.lines, "width": self.columns}
        pixels = torch.cat([self.model.decode_image_tokens(image_tokens=t, **size) for t in self.ids[tokens].split(1)])
        return processor.postprocess(list(pixels.float().cpu()), return_tensors="PIL.Image.Image")["pixel_values"]

    def generate(
        self, processor: Any, prompts: Sequence[str], size: tuple[int, int] | None = None, **knobs: Any
    ) -> Tensor:
        tokens, mask = self.encode(processor, prompts, size)
        constraint, prompt = self.constraint, tokens.shape[1]
        assert constraint is not None
        sets = [self.ids[: self.vocab_size][allowed] for allowed in constraint.sets]
        kinds = constraint.kinds.tolist()
        if self.guidance is not None:
            knobs["guidance_scale"] = self.guidance_scale
            knobs["negative_prompt_ids"] = self.ids[self.guidance.tokens]
            knobs["negative_prompt_attention_mask"] = self.guidance.mask
        out = self.model.generate(
            input_ids=self.ids[tokens],
            attention_mask=mask,
            max_new_tokens=self.image_tokens,
            prefix_allowed_tokens_fn=lambda row, ids: sets[kinds[len(ids) - prompt]],
            **knobs,
        )
        ours = self.ids.new_zeros(self.config.vocab_size)
        ours[self.ids[: self.vocab_size]] = torch.arange(self.vocab_size, device=self.device)
        return ours[out[:, prompt:]]


class GlmImageTarget(ImageTarget):
    """GLM-Image's autoregressive stage inside transformers' `generate`: a small picture of codes, then the large one,
    each with positions (time, row, column) of its own. Its ids are such as an adapter's already.

    row_width is the large picture's, and known with the prompt.
    """

    row_width = 1
    places: Tensor | None = None  # [3, B, P + what comes]: the prompt's places, packed, then those of new tokens

    @property
    def vocab_size(self) -> int:
        return self.config.vision_vocab_size

    @property
    def codes(self) -> Tensor:
        return normalize(self.model.model.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)

    def prefill(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        image_grid_thw: Tensor | None = None,
        images_per_sample: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        positions: Tensor | None = None,  # made here: those that generate prepares are the text's
        **kwargs: Any,
    ) -> Any:
        if self.guidance is not None:
            raise ConfigError("GLM-Image draws its tokens without guidance; leave guidance_scale out of generate")
        inner = self.model.model
        if image_grid_thw is not None:
            grids = {"image_grid_thw": image_grid_thw, "images_per_sample": images_per_sample}
            before, _ = inner.get_rope_index(tokens, attention_mask=mask, **grids)
            if mask is not None:
                order = mask.long().argsort(dim=1, descending=True, stable=True)
                before = before.gather(2, order.expand(3, -1, -1))
            self.places = torch.cat([before, inner._cached_decode_position_ids.transpose(0, 1)], dim=2)
            self.width = tokens.shape[1]
            self.row_width = int(image_grid_thw[:, 2].max())
        if (features := (mm_encoder_outputs or {}).get("image")) is not None:
            codes = inner.get_image_tokens(features.pooler_output).view(-1)
            tokens = tokens.masked_scatter(tokens == self.model.config.image_token_id, codes.to(tokens))
        return super().prefill(tokens, mask, **kwargs)

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        if self.places is not None:
            prompt = self.present(torch.tensor(self.prompt_lengths, device=positions.device))[:, None]
            column = torch.where(positions < prompt, positions, self.width + positions - prompt)
            column = column.clamp(max=self.places.shape[2] - 1).expand(3, len(prompt), -1)
            positions = self.present(self.places.transpose(0, 1)).transpose(0, 1).gather(2, column)
        return super().call(tokens, positions, mask, keep_logits)


ADAPTERS: dict[str, type[Adapter]] = {"janus": JanusTarget, "emu3": Emu3Target}
"""What the pipeline draws with, by model type."""

TARGETS: dict[str, type[Target]] = {"glm_image": GlmImageTarget}
"""What transformers' own `generate` draws with, where the general Target will not do."""

NOT_HERE = {
    "glm_image": "its image tokens are turned into a picture by diffusers' GlmImagePipeline: load that, and pass it to "
    "polyspec.modalities.image.accelerate",
    "chameleon": "transformers' Chameleon reads pictures but cannot draw them: it rules out every image token, and its "
    "image tokenizer has no decoder; Anole's weights change neither",
}
"""Why a model type that draws elsewhere does not draw in the pipeline."""


def adapter(kind: str, source: Any) -> type[Adapter]:
    """The adapter for a model type; CheckpointError, naming `source`, if it cannot draw."""
    if kind not in ADAPTERS:
        reason = NOT_HERE.get(kind) or str(unknown("image model type", kind, ADAPTERS))
        raise CheckpointError(f"{source} has no head for image tokens that the pipeline could use: {reason}")
    return ADAPTERS[kind]


def model_class(kind: type[Adapter]) -> Any:
    """The transformers class that an adapter's checkpoints are loaded with."""
    return getattr(transformers, kind.loads)


def make_image_target(model: PreTrainedModel, guidance_scale: float) -> Adapter:
    """The Target for an image model; CheckpointError if the model cannot draw."""
    return adapter(model.config.model_type, type(model).__name__)(model, guidance_scale)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels `[B, H, W, 3]` in [-1, 1] to PIL images."""
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(b) for b in bytes_]
