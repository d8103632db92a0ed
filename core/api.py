"""`custom_generate`: a recipe inside `model.generate` of any transformers model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Coupled, Draws, Greedy, Independent, Processing, row_seeds
from polyspec.drafting.base import Context
from polyspec.errors import ConfigError, InputError, UnsupportedModelError
from polyspec.guidance import Guidance
from polyspec.metrics import DecodingStats
from polyspec.recipe import Method, build, find_recipe
from polyspec.target import Target, make_target, own_targets


def make_draws(
    method: Method, do_sample: bool, seed: int | Sequence[int] | None, rows: int, device: torch.device
) -> Draws:
    """How the recipe draws tokens: greedily, with fresh randomness, or with shared Gumbel noise."""
    if not do_sample:
        return Greedy()
    seeds = row_seeds(seed, rows, device)
    if method.draws == "coupled":
        return Coupled(seeds)
    return Independent(generator_of(seeds), seeds)


def generator_of(seeds: Tensor) -> torch.Generator:
    """One generator on the device of the rows' seeds `[B]`: every row's matters, and so does their order."""
    mixed = 0
    for row in seeds.tolist():
        mixed = (mixed * 6364136223846793005 + row + 1442695040888963407) % 2**63
    return torch.Generator(seeds.device).manual_seed(mixed)


@torch.no_grad()
def decode(
    method: Method, target: Target, sequences: Sequences, processing: Processing, draws: Draws, prefill: dict[str, Any]
) -> DecodingStats:
    """Run a recipe on `target`: prefill the prompts of `sequences`, then loop until every row has stopped.

    prefill: keyword arguments of `Target.prefill` beyond the tokens.
    """
    stats = DecodingStats(recipe=method.recipe.name, guarantee=method.recipe.guarantee)
    start = time.perf_counter()
    drafter = method.drafter()
    if not target.one_pass and (getattr(method.loop, "one_pass", True) or drafter.hidden_layers):
        raise UnsupportedModelError(
            f"{type(target.model).__name__} says several codes a step, which recipe {method.recipe.name!r} cannot draft; "
            "choose prompt_lookup, or gumbel_coupled or speculative_sampling with a smaller model of its kind"
        )
    drafter.check(target)
    if hasattr(method.loop, "check"):
        method.loop.check(target, drafter)
    target.hidden_layers = tuple(drafter.hidden_layers)
    prompt = sequences.tokens[:, : sequences.prompt_length]
    mask = None
    if any(sequences.pads):
        mask = (torch.arange(sequences.prompt_length, device=prompt.device) >= sequences.pad_tensor[:, None]).long()
    output = target.prefill(prompt, mask, capacity=sequences.limit + 64, **prefill)
    stats.prefill_seconds = time.perf_counter() - start
    context = Context(target, sequences, processing, draws, copy(method.length), stats)
    drafter.begin(context, output.hidden if output is not None else None)
    method.loop.run(context, drafter)
    stats.wall_seconds = time.perf_counter() - start
    return stats


class CustomGenerate:
    """A recipe as a `custom_generate` callable; made by `polyspec.custom_generate`."""

    def __init__(self, method: Method, *, seed: int | Sequence[int] | None = None, streamer: Any = None):
        self.method = method
        self.seed = seed
        self.streamer = streamer
        self.stats = DecodingStats(recipe=method.recipe.name, guarantee=method.recipe.guarantee)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        check_wishes(model, generation_config, model_kwargs)
        is_encoder_decoder = model.config.is_encoder_decoder
        mask = model_kwargs.pop("decoder_attention_mask" if is_encoder_decoder else "attention_mask", None)
        past = model_kwargs.pop("past_key_values", None)
        positions = model_kwargs.pop("position_ids", None)
        if positions is not None and (is_encoder_decoder or positions.shape[-1] != input_ids.shape[1]):
            positions = None
        for key in ("decoder_position_ids", "use_cache", "logits_to_keep", "output_hidden_states"):
            model_kwargs.pop(key, None)
        input_ids = input_ids.long()  # some models' own generate make int32 ones
        check_prompt(input_ids, model, mask, getattr(generation_config, "_mask_length", None))
        guidance, processors = split_guidance(logits_processor)
        eos, max_length, stops = split_stopping(stopping_criteria, generation_config)
        if max_length <= input_ids.shape[1]:
            raise InputError(
                f"max_length={max_length} leaves no room behind a prompt of {input_ids.shape[1]} tokens; raise "
                "max_length or set max_new_tokens"
            )
        target = make_target(model, guidance)
        target.keep_finished = bool(generation_config.return_dict_in_generate)
        pad = generation_config._pad_token_tensor
        emit = None if self.streamer is None else self.streamer.put
        sequences = Sequences(
            input_ids,
            max_length - input_ids.shape[1],
            mask=mask,
            eos=None if eos is None else eos.to(input_ids.device),
            pad=0 if pad is None else int(pad),
            stops=stops,
            emit=emit,
        )
        draws = make_draws(self.method, generation_config.do_sample, self.seed, input_ids.shape[0], input_ids.device)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        prefill = {"past": past, "positions": positions, **model_kwargs}
        self.stats = decode(self.method, target, sequences, Processing(processors), draws, prefill)
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            kind = GenerateEncoderDecoderOutput if is_encoder_decoder else GenerateDecoderOnlyOutput
            return kind(sequences=sequences.result(), past_key_values=target.past(sequences.pads))  # type: ignore[arg-type]
        return sequences.result()


def check_wishes(model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse what `generate` was asked for and no recipe can do: ConfigError, UnsupportedModelError or InputError."""
    if generation_config.num_beams > 1:
        raise ConfigError("num_beams > 1 cannot be combined with this recipe; use num_beams=1")
    if not model_kwargs.get("use_cache", True):
        raise ConfigError("use_cache=False: drafts are checked against a key-value cache; leave use_cache on")
    for wish in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if generation_config.return_dict_in_generate and getattr(generation_config, wish, None):
            raise ConfigError(f"{wish}=True: a run keeps nothing of that size; leave {wish} out")
    own = own_targets().get(model.config.model_type)
    if own is not None and own.elsewhere:
        raise UnsupportedModelError(f"{type(model).__name__}.generate cannot hand over to a recipe; use {own.elsewhere}")
    if model_kwargs.get("inputs_embeds") is not None and not getattr(own, "takes_embeds", False):
        raise InputError("prompts as inputs_embeds are not supported; pass input_ids")


def custom_generate(
    recipe: str, *, seed: int | Sequence[int] | None = None, streamer: Any = None, **overrides: Any
) -> CustomGenerate:
    """A callable for `model.generate(..., custom_generate=…)` that decodes with `recipe`.

    recipe: a name out of `polyspec.recipes()`. overrides: its knobs, and what it needs (`draft_model=`, `heads=`, …),
    as objects or folders. seed: s seeds row r with s + r; a list gives one a row; None uses torch's global generator.
    streamer: a transformers streamer (generate() does not hand its own to a custom callable). `.stats` holds the
    DecodingStats of the last call. Raises ConfigError for an unknown recipe or knob, or a need that is missing.
    """
    found = find_recipe(recipe)
    if found.modalities == ("recommendation",):
        raise ConfigError(f"{recipe!r} searches for lists of items; use polyspec.pipeline('recommendation', recipe=…)")
    if "rule" in found.config.loop and str(found.config.loop._target_).endswith(".Continuous"):
        raise ConfigError(f"{recipe!r} is for models of continuous tokens; use polyspec.pipeline('image', recipe=…, target=…)")
    return CustomGenerate(build(found, overrides), seed=seed, streamer=streamer)


def check_prompt(input_ids: Tensor, model: PreTrainedModel, mask: Tensor | None, covered: int | None = None) -> None:
    """InputError unless `input_ids` is a non-empty `[B, P]` tensor of ids the model knows, padded on the left.

    mask: `[B, P]`, or None if all of it was ones; then covered says how many columns it had, if there was one."""
    if input_ids.ndim != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise InputError(f"the prompt is empty (input_ids has shape {list(input_ids.shape)}); give at least one token")
    vocab = model.config.get_text_config(decoder=True).vocab_size
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab:
        raise InputError(f"the prompt holds token id {low if low < 0 else high}; the model knows 0 … {vocab - 1}")
    covered = covered if mask is None else mask.shape[1]
    if covered not in (None, input_ids.shape[1]):
        raise InputError(
            f"the attention mask covers {covered} tokens, the prompt has {input_ids.shape[1]}; give all of the prompt, "
            "also what past_key_values holds of it"
        )
    if mask is None:
        return
    real = mask.long()
    if bool((real.diff(dim=1) < 0).any()):
        raise InputError("the attention mask has gaps or padding on the right; pad prompts on the left")
    if not bool(real[:, -1].all()):
        row = int(real[:, -1].argmin())
        raise InputError(f"row {row} of the batch has an empty prompt; give it at least one token")


def split_guidance(processors: LogitsProcessorList) -> tuple[Guidance | None, list[Any]]:
    """Take classifier-free guidance out of a processor list: the target runs both streams in one forward."""
    guidance, rest = None, []
    for processor in processors:
        if isinstance(processor, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor):
            context = processor.unconditional_context
            guidance = Guidance(processor.guidance_scale, context["input_ids"], context["attention_mask"])
        else:
            rest.append(processor)
    if guidance is not None and guidance.scale == 1:
        guidance = None
    return guidance, rest


def split_stopping(criteria: StoppingCriteriaList, generation_config: Any) -> tuple[Tensor | None, int, list[Any]]:
    """(end-of-sequence ids, maximal length, criteria to be asked about every committed prefix)."""
    eos, max_length, rest = None, generation_config.max_length, []
    for criterion in criteria:
        if isinstance(criterion, stopping_criteria.EosTokenCriteria):
            eos = criterion.eos_token_id
        elif isinstance(criterion, stopping_criteria.MaxLengthCriteria):
            max_length = min(max_length, criterion.max_length)
        else:
            rest.append(criterion)
    return eos, max_length, rest
