"""Autoregressive text-to-image models of transformers behind the Target seam."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from polyspec.errors import CheckpointError, unknown
from polyspec.modalities.image.codebook import neighbour_table
from polyspec.target import Guidance, Target, guide_logits


class JanusTarget(Target):
    """Janus and Janus-Pro: image tokens have an embedding and an output head of their own.

    A prompt ends with the begin-of-image token; everything behind it is an image token. The unconditional prompt is
    the same prompt with all text replaced by the pad token, as in the model's own `generate`.
    """

    model: Any  # JanusForConditionalGeneration

    def __init__(self, model: PreTrainedModel, guidance_scale: float = 1.0):
        super().__init__(model)
        self.guidance_scale = guidance_scale
        self.image_tokens = model.model.vision_model.config.num_image_tokens
        self.row_width = math.isqrt(self.image_tokens)

    @property
    def vocab_size(self) -> int:
        return self.model.config.vq_config.num_embeddings

    @property
    def codebook(self) -> Tensor:
        """What image tokens stand for `[V, d]`: unit vectors, as the model decodes them."""
        return normalize(self.model.model.vqmodel.quantize.embedding.weight.detach().float(), dim=-1)

    @property
    def neighbours(self) -> Tensor:
        """Every image token's nearest others in the codebook, nearest first."""
        return neighbour_table(self.model, self.codebook)

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        self.guidance = None
        if self.guidance_scale > 1:
            generation = self.model.generation_config
            kept = (tokens == generation.bos_token_id) | (tokens == generation.generation_kwargs["boi_token_id"])
            unconditional = torch.where(kept, tokens, generation.pad_token_id)
            self.guidance = Guidance(self.guidance_scale, unconditional, mask, guide_logits)
        output = super().prefill(tokens, mask, **kwargs)
        self.first_image = torch.tensor(self.prompt_lengths, device=tokens.device)[:, None]
        return output

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        core = self.model.model
        if not keep_logits:
            embeds = self.model.get_input_embeddings()(tokens)
        else:
            embeds = self.model.prepare_embeddings_for_image_generation(tokens.clamp(max=self.vocab_size - 1))
            if any(kept < prompt for kept, prompt in zip(self.cache_lengths, self.prompt_lengths, strict=True)):
                # the first round: the prompt's last token, then image tokens
                table = self.model.get_input_embeddings()
                texts = table(tokens.clamp(max=table.num_embeddings - 1))
                embeds = torch.where((positions < self.first_image)[..., None], texts, embeds)
        out = core.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(self.hidden_layers),
        )
        return core.generation_head(out.last_hidden_state) if keep_logits else None, out.hidden_states

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens `[B, T]` to pixels `[B, H, W, 3]` in [-1, 1]."""
        return self.model.decode_image_tokens(tokens).float()


ADAPTERS: dict[str, type[JanusTarget]] = {"janus": JanusTarget}


def make_image_target(model: PreTrainedModel, guidance_scale: float) -> JanusTarget:
    """The Target for an image model; CheckpointError if the model cannot draw."""
    kind = model.config.model_type
    if kind not in ADAPTERS:
        near = unknown("image model type", kind, ADAPTERS)
        raise CheckpointError(f"{type(model).__name__} has no head for image tokens: {near}")
    return ADAPTERS[kind](model, guidance_scale)
