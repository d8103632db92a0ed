"""What a loop needs from a model: prefill, a forward pass over drafted tokens, and rollback.

`Target` wraps any decoder-only transformers model, an `EncoderDecoderTarget` an encoder-decoder one. A modality whose model
embeds tokens or computes logits in its own way overrides `call`; no loop knows a model class.

Between rounds every row has all its committed tokens but the last in the cache. The last one is fed together with the
next drafts, so a round is one forward pass whatever was accepted, and the first round is no special case.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from polyspec.architecture import attention_windows, check_rollback
from polyspec.attention import grouped
from polyspec.cache import Layout, RaggedCache
from polyspec.errors import ConfigError, InputError, UnsupportedModelError
from polyspec.guidance import Guidance
from polyspec.laid_out import Layers, laid_out, using
from polyspec.prompt_inputs import PromptInputs, check_placeholders, gather_inputs, refuse_guidance, split_once
from polyspec.taps import tapped
from polyspec.trees import Tree


@dataclass(frozen=True, slots=True)
class Output:
    """One forward pass over T tokens: logits `[B, T, V]` after guidance, and the hidden states asked for.

    `hidden` holds one tensor `[S, T, d]` per layer in `Target.hidden_layers`, S = B rows or 2B with guidance.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Target:
    """A decoder-only transformers model with one cache row a stream (B rows, 2B with guidance).

    Raises UnsupportedModelError for a model whose state cannot be rolled back or that runs without a cache.
    """

    row_width: int | None = None
    """Tokens in an image row, for targets that draw images in raster order."""
    one_pass = True
    """Whether a token takes one pass of one decoder, as trees, heads on its hidden states and early exits need."""
    step = 1
    """Consecutive tokens, the last of them at a multiple of `step` behind the prompt, that do not depend on each other:
    one call scores them all, so loops take whole steps, and lengths are counted in them."""
    elsewhere: str | None = None
    """What decodes such a model, where its own `generate` cannot hand over to a recipe."""
    frame = 1
    """Tokens after which the kinds of tokens repeat, codebook by codebook say."""

    def __init__(self, model: PreTrainedModel, guidance: Guidance | None = None, hidden_layers: Sequence[int] = ()):
        check_rollback(model)
        self.model = model
        self.guidance = guidance
        self.hidden_layers = tuple(hidden_layers)
        self.config = model.config.get_text_config(decoder=True)
        self.device = model.device
        self.cache: RaggedCache | None = None
        parameters = inspect.signature(model.forward).parameters
        self.position_key = next((k for k in ("decoder_position_ids", "position_ids") if k in parameters), None)
        # Without explicit positions a model counts them from the cache's length, which all rows then have to share.
        self.lockstep = self.position_key is None
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        self.float_mask = self.config._attn_implementation not in ("sdpa", "flex_attention")
        if "flash" in str(self.config._attn_implementation):
            raise UnsupportedModelError(
                "flash attention takes no mask over drafted tokens; load the model with attn_implementation='sdpa'"
            )
        # older models ask for the attention's name and take a branch of their own for each they know
        self.takes_attention = bool(getattr(model, "_supports_attention_backend", False))
        self.windows = attention_windows(self.config)
        self.extra: dict[str, Any] = {}
        self.given = PromptInputs()  # what came with the prompt
        self.once: Mapping[str, Any] = {}  # of that, what the pass under way gets
        self.wanted = 0
        self.linears: Layers = ()  # since the last `prefill` or `open`; weights may change between runs
        self.keep_finished = False  # whether rows that have stopped stay in the cache, for `past`

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def input_size(self) -> int:
        """Token ids that may go in: all that may come out, and what else stands in a prompt."""
        return self.vocab_size

    @property
    def cache_lengths(self) -> list[int]:
        """Tokens kept in each stream's cache."""
        assert self.cache is not None
        return self.cache.all_lengths

    # -- what a loop calls -------------------------------------------------------------------------------------------

    def prefill(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        capacity: int,
        past: Cache | None = None,
        positions: Tensor | None = None,
        **extra: Any,
    ) -> Output | None:
        """Run the prompt `[B, P]` but for each row's last token, dropping padding (mask `[B, P]`, 1 = token).

        capacity: slots to allocate (prompt + everything to come). past: a filled transformers cache to continue from,
        holding the first of the prompt's tokens. positions: of the prompt's tokens `[.., B, P]`, where the model counts
        them in its own way. extra: keyword arguments every forward pass gets, but for images and what else belongs to the
        prompt alone. Returns the hidden states of the prompt (row b: its first `lengths[b]` tokens), None if there was
        nothing to run.
        """
        self.rows = tokens.shape[0]
        self.linears = laid_out(self.model)
        check_placeholders(self.model, tokens, extra)
        once, extra = split_once(extra)
        self.extra = {**self.extra, **extra}
        if self.guidance is not None:
            refuse_guidance(once)
            tokens, mask, positions = *self.with_unconditional(tokens, mask), None
        order = None if mask is None else packing(mask)
        tokens, counts = pack_rows(tokens, mask)
        self.given = gather_inputs(self.model, tokens, counts, order, once, positions)
        self.prompts, self.prompt_lengths = tokens, counts
        kept = [c - 1 for c in counts]
        self.streams = tokens.shape[0]
        self.cache = RaggedCache(self.streams, capacity)
        if past is not None and (held := int(past.get_seq_length())) > 0:
            return self.continue_from(past, held, tokens, kept, mask)
        if max(kept) == 0:
            return None
        # tokens that see what follows them have to see the last one too, which is run again with the first drafts
        width = max(counts) if self.given.bidirectional else max(kept)
        output = self.run_prompt(tokens[:, :width])
        self.cache.rollback(kept)
        return Output(output.logits, tuple(h[:, : max(kept)] for h in output.hidden))

    def run_prompt(self, tokens: Tensor) -> Output:
        """A pass over prompt tokens `[S, T]`, with what came beside them."""
        self.once = dict(self.given.once)
        if self.once.get("inputs_embeds") is not None:
            self.once["inputs_embeds"] = self.once["inputs_embeds"][:, : tokens.shape[1]]
        try:
            return self.run(tokens, None, keep_logits=False)
        finally:
            self.once, self.given = {}, replace(self.given, once={})  # pictures and masks are not kept any longer

    def open(self, rows: int, capacity: int) -> None:
        """Begin with an empty cache of `capacity` slots, for a loop that lays its tokens out itself; not under guidance."""
        if self.guidance is not None:
            raise ConfigError("guidance_scale is not supported by this loop; leave it out")
        self.rows = self.streams = rows
        self.linears = laid_out(self.model)
        self.cache = RaggedCache(rows, capacity)

    def forward(self, tokens: Tensor, tree: Tree | Layout | None = None, wanted: int = 0) -> Output:
        """Score `[B, T]` tokens: each row's last committed one and its drafts. tree: how the T tokens hang together, node 0
        the committed token; None is a chain. They may be a tree's last T nodes only, if the cache's last tokens are the
        others. A Layout says itself where tokens sit and what they see. wanted: only the last `wanted` tokens' logits are
        needed (0: all). Call `rollback` afterwards."""
        streams = tokens if self.guidance is None else torch.cat([tokens, self.unconditional(tokens)])
        self.wanted = wanted
        try:
            output = self.run(streams, tree, keep_logits=True)
        finally:
            self.wanted = 0
        return Output(output.logits[:, -wanted:], output.hidden)

    def rollback(self, lengths: Sequence[int], running: Sequence[bool] | None = None) -> None:
        """Keep the first `lengths[b]` tokens of each row: committed tokens but the last, padding not counted.

        running: rows not running may leave the batch; what later forward passes return for them is arbitrary."""
        assert self.cache is not None
        if self.guidance is not None:
            # an unconditional row has another prompt, and so another length, but the same generated tokens
            grown = [new - old for new, old in zip(lengths, self.cache_lengths, strict=False)]
            others = zip(self.cache_lengths[len(lengths) :], grown, strict=True)
            lengths = [*lengths, *(max(n + g, 0) for n, g in others)]
        self.cache.rollback(lengths)
        if running is not None and not all(running) and not self.keep_finished:
            self.drop([*running] * (self.streams // self.rows))

    def drop(self, running: Sequence[bool]) -> Tensor | None:
        """Let go of the streams that are not `running [S]` where that pays. Returns which of those present stay, None
        if all do; for overriding, where a model holds more than a key-value cache of each stream."""
        assert self.cache is not None
        return self.cache.drop(running)

    def present(self, x: Tensor) -> Tensor:
        """The rows of `x [S or B, …]` that are still in the batch."""
        assert self.cache is not None
        kept = self.cache.present
        return x if kept is None else x[kept[kept < len(x)]]

    def keep_path(self, path: Tensor) -> None:
        """After a tree forward: move nodes `path [B, D]` to follow the kept tokens; `rollback` then keeps a prefix."""
        assert self.cache is not None
        self.cache.keep_path(self.present(path if self.guidance is None else torch.cat([path, path])))

    def past(self, pads: Sequence[int]) -> Cache:
        """What transformers' `generate` would have left as `past_key_values` behind prompts with `pads` of padding."""
        assert self.cache is not None
        return self.cache.padded(pads)

    # -- how a model is called ---------------------------------------------------------------------------------------

    def call(self, tokens: Tensor, positions: Tensor, mask: Any, keep_logits: bool) -> tuple[Tensor | None, Any]:
        """One model call on `[S, T]` tokens: (logits `[S, T, V]` or None, hidden states by number or None). For overriding."""
        kwargs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "past_key_values": self.cache}
        if self.position_key:
            kwargs[self.position_key] = positions
        if self.takes_logits_to_keep:
            kwargs["logits_to_keep"] = self.wanted if keep_logits else 1
        kwargs |= self.once
        with tapped(self.model, self.hidden_layers, self.config.num_hidden_layers) as hidden:
            every = bool(self.hidden_layers) and hidden is None
            out = self.model(**kwargs, **self.extra, use_cache=True, output_hidden_states=every, return_dict=True)
        return out.logits if keep_logits else None, out.hidden_states if hidden is None else hidden

    @torch.no_grad()
    def run(self, tokens: Tensor, tree: Tree | Layout | None, keep_logits: bool) -> Output:
        assert self.cache is not None
        dropped = self.cache.present is not None
        if dropped:
            every, tokens = tokens, self.present(tokens)
            if isinstance(tree, Tree) and tree.parents.dim() == 2:
                tree = Tree(self.present(tree.parents), tree.height, tree.width)
        slots, mask = self.layout(tokens.shape[1], tree, tokens.device)
        with using(self.linears), grouped(self.config) if self.takes_attention else nullcontext():
            logits, hidden = self.call(tokens, self.place(slots), mask, keep_logits)
        if logits is not None and self.guidance is not None:
            half = len(tokens) // 2
            logits = self.guidance.combine(logits[:half], logits[half:], self.guidance.scale)
        chosen = tuple(hidden[i] for i in self.hidden_layers) if self.hidden_layers else ()
        if dropped:
            among = self.among(len(every))
            logits = None if logits is None else logits[among[: self.rows]]
            chosen = tuple(h[among] for h in chosen)
        return Output(logits if logits is not None else tokens.new_empty(0), chosen)

    def among(self, streams: int) -> Tensor:
        """Where each stream `[S]` is among those present; streams that have left are given the first one's place."""
        assert self.cache is not None and self.cache.present is not None
        present = self.cache.present
        return present.new_zeros(streams).scatter(0, present, torch.arange(len(present), device=present.device))

    def place(self, slots: Tensor) -> Tensor:
        """The positions `[S, T]`, or `[.., S, T]` where the model has several kinds, of tokens in `slots [S, T]`."""
        assert self.cache is not None
        places = self.given.places
        return slots if places is None else places.of(slots, self.cache.present)

    def layout(self, new: int, tree: Tree | Layout | None, device: torch.device) -> tuple[Tensor, Any]:
        """Positions `[S, T]` and attention mask(s) `[S or 1, 1, T, K]` of `new` tokens behind the kept ones."""
        assert self.cache is not None
        chain = not isinstance(tree, Layout) and (tree is None or tree.size == 0)
        if new == 1 and chain and self.cache.uniform and self.windows == {"": None} and not self.float_mask:
            kept = torch.tensor(self.cache.lengths, device=device)[:, None]
            return kept, None  # one token sees all there is
        at = tree if isinstance(tree, Layout) else self.cache.layout(new, tree, device)
        positions = (at.base + at.depth).expand(len(self.cache.lengths), -1)
        distance = at.depth[:, :, None] - at.key_depth[:, None, :]
        masks = {
            kind: self.finish_mask(
                at.visible if reach is None else at.visible & reach(distance, at.base, at.depth, at.key_depth)
            )
            for kind, reach in self.windows.items()
        }
        return positions, masks.get("", masks)

    def finish_mask(self, visible: Tensor) -> Tensor:
        assert self.cache is not None
        visible = visible[:, None].expand(len(self.cache.lengths), -1, -1, -1)  # not every model broadcasts it
        if not self.float_mask:
            return visible
        dtype = self.model.dtype
        return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)

    def with_unconditional(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prompts as one left-padded batch `[2B, P']`."""
        assert self.guidance is not None
        mask = torch.ones_like(tokens) if mask is None else mask
        other = tokens[:, -1:] if self.guidance.tokens is None else self.guidance.tokens.to(tokens.device)
        if other.shape[0] != tokens.shape[0]:
            raise InputError(f"{other.shape[0]} negative prompts for {tokens.shape[0]} prompts; give one a row")
        other_mask = torch.ones_like(other) if self.guidance.mask is None else self.guidance.mask.to(tokens.device)
        width = max(tokens.shape[1], other.shape[1])

        def left_pad(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (width - x.shape[1], 0))

        return (
            torch.cat([left_pad(tokens), left_pad(other)]),
            torch.cat([left_pad(mask), left_pad(other_mask.to(mask.dtype))]),
        )

    def unconditional(self, tokens: Tensor) -> Tensor:
        """What the unconditional rows are fed with `tokens [B, T]`: the same, but for the end of their own prompts."""
        assert self.cache is not None
        kept, prompt = self.cache_lengths[self.rows :], self.prompt_lengths[self.rows :]
        if all(k >= p for k, p in zip(kept, prompt, strict=True)):
            return tokens
        kept, prompt = (torch.tensor(x, device=tokens.device)[:, None] for x in (kept, prompt))
        index = kept + torch.arange(tokens.shape[1], device=tokens.device)
        own = self.prompts[self.rows :].gather(1, index.clamp(max=self.prompts.shape[1] - 1))
        return torch.where(index < prompt, own, tokens)

    def continue_from(
        self, past: Cache, held: int, tokens: Tensor, kept: list[int], mask: Tensor | None
    ) -> Output | None:
        """Take over a filled cache, then run what it lacks of the packed prompt."""
        assert self.cache is not None
        if self.guidance is not None:
            raise InputError("past_key_values cannot be continued under guidance: the unconditional stream has none")
        if self.given.bidirectional:
            raise InputError(
                "past_key_values cannot be continued where an image's tokens see each other; leave them out"
            )
        in_past = torch.ones_like(tokens[:, :held]) if mask is None else mask[:, :held]
        slots = in_past.long().argsort(dim=1, descending=True, stable=True)
        have = [min(n, k) for n, k in zip(in_past.sum(1).tolist(), kept, strict=True)]
        self.cache.adopt(past, slots, have)
        missing = max(k - h for k, h in zip(kept, have, strict=True))
        output = None
        if missing > 0:
            start = torch.tensor(have, device=tokens.device)[:, None]
            columns = (start + torch.arange(missing, device=tokens.device)).clamp(max=tokens.shape[1] - 1)
            output = self.run_prompt(tokens.gather(1, columns))
        self.cache.rollback(kept)
        return output


def pack_rows(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """Move each row's real tokens to the front: (`[B, P]` tokens, how many are real in each row).

    What follows them is never seen: it lies behind the causal mask and its slots are overwritten.
    """
    if mask is None:
        return tokens, [tokens.shape[1]] * tokens.shape[0]
    counts = mask.long().sum(1).tolist()
    if min(counts) == 0:
        raise InputError(f"row {counts.index(0)} of the batch has an empty prompt; give it at least one token")
    return tokens.gather(1, packing(mask))[:, : max(counts)], counts


def packing(mask: Tensor) -> Tensor:
    """The columns `[B, P]` of a mask's real tokens in their order, then those of its padding."""
    return mask.long().argsort(dim=1, descending=True, stable=True)


@cache
def own_targets() -> dict[str, type[Target]]:
    """Model types with a Target of their own inside transformers' `generate`: what the modalities' modules `target` call
    `TARGETS`."""
    found: dict[str, type[Target]] = {}
    for entry in entry_points(group="polyspec.modalities"):
        module = f"{entry.value.partition(':')[0]}.target"
        if find_spec(module) is not None:
            found |= getattr(import_module(module), "TARGETS", {})
    return found


def make_target(model: PreTrainedModel, guidance: Guidance | None = None, hidden_layers: Sequence[int] = ()) -> Target:
    """The Target for a transformers model."""
    # it is a Target and so imports this module
    paired = import_module("polyspec.encoder_decoder").EncoderDecoderTarget
    general = paired if model.config.is_encoder_decoder else Target
    return (own_targets().get(model.config.model_type) or general)(model, guidance, hidden_layers)
