"""What trained draft heads share: a checkpoint folder that knows its target, and the target's own token layers.

A head is small because it borrows: tokens are embedded and predictions turned into logits by the target's layers,
which stay frozen and are never saved with the head. Optionally it predicts only frequent tokens (EAGLE-3, 2503.01840;
FR-Spec, 2502.14856): `vocab_map [V_d]` lists their target ids, the target's output rows are gathered once, and every
other token has q = 0, which any exact rule corrects for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, PreTrainedModel

from polyspec.drafting.base import Context, Draft
from polyspec.drafting.lean import Frozen, rows_of
from polyspec.errors import CheckpointError, ConfigError, UnsupportedModelError
from polyspec.laid_out import Linear, derived, linear
from polyspec.pipelines import load
from polyspec.target import Target, make_target


class HeadConfig(LlamaConfig):
    """Sizes of a head (Llama's names) and of the target it was made for. `vocab_size` is what the head predicts."""

    target_name: str = ""
    target_hidden_size: int = 0
    target_num_layers: int = 0
    target_vocab_size: int = 0
    target_layers: list[int] | None = None  # indices into transformers' hidden_states
    even_embeddings: bool = False  # the head reads every token's embedding over its root mean square

    @property
    def trimmed(self) -> bool:
        return self.vocab_size != self.target_vocab_size


class HeadModel(PreTrainedModel):
    """Base of head models: `for_target` makes an untrained one, `save_pretrained` and `from_pretrained` store it."""

    config_class: ClassVar[type[HeadConfig]] = HeadConfig
    config: HeadConfig
    added: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of weights that training may add to heads which were trained without them."""
    _supports_sdpa = True
    vocab_map: Tensor | None

    def __init__(self, config: HeadConfig):
        super().__init__(config)
        self.register_buffer("vocab_map", torch.arange(config.vocab_size) if config.trimmed else None)

    @classmethod
    def for_target(
        cls, target: Target | PreTrainedModel, *, seed: int = 0, vocabulary: Tensor | None = None, **sizes: Any
    ) -> Self:
        """An untrained head for `target`, float32 on the CPU, its weights fixed by `seed`.

        vocabulary: ids of the tokens to predict, None for all. sizes: fields of the head's config; by default as the
        target's. Raises ConfigError for sizes that do not fit together.
        """
        target = make_target(target) if isinstance(target, PreTrainedModel) else target
        theirs = target.config
        known = {
            "target_name": name_of(target),
            "target_hidden_size": theirs.hidden_size,
            "target_num_layers": theirs.num_hidden_layers,
            "target_vocab_size": target.vocab_size,
            "vocab_size": target.vocab_size if vocabulary is None else len(vocabulary),
        }
        # embeddings are often a tenth of the hidden states they stand beside, and are learnt from as much more slowly
        known["even_embeddings"] = sizes.pop("even_embeddings", True)
        config = cls.config_class(**{**cls.default_sizes(target, sizes), **known})
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(f"{config.num_attention_heads} heads do not divide a width of {config.hidden_size}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
        if vocabulary is not None and config.trimmed:
            assert model.vocab_map is not None
            model.vocab_map.copy_(vocabulary)
        return model.eval()

    @classmethod
    def default_sizes(cls, target: Target, sizes: dict[str, Any]) -> dict[str, Any]:
        """The config fields of a head for `target` from what the user gave."""
        theirs = target.config
        width = sizes.get("hidden_size", theirs.hidden_size)
        heads = sizes.get("num_attention_heads", theirs.num_attention_heads)
        rope = getattr(theirs, "rope_parameters", None) or {}
        own_dim = width // heads
        if (width, heads) == (theirs.hidden_size, theirs.num_attention_heads):
            own_dim = getattr(theirs, "head_dim", None) or own_dim
        fallback = {
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": min(heads, getattr(theirs, "num_key_value_heads", None) or heads),
            "head_dim": own_dim,
            "intermediate_size": getattr(theirs, "intermediate_size", None) or 4 * width,
            "rope_parameters": rope if "rope_theta" in rope else None,
            "max_position_embeddings": getattr(theirs, "max_position_embeddings", 4096),  # rotary: no limit of its own
        }
        return {**fallback, **sizes}

    def check(self, target: Target) -> None:
        """CheckpointError, naming both, unless these heads were made for a model of `target`'s sizes."""
        c = self.config
        ours = (c.target_hidden_size, c.target_num_layers, c.target_vocab_size)
        theirs = (target.config.hidden_size, target.config.num_hidden_layers, target.vocab_size)
        if ours != theirs:
            sizes = "width {}, {} layers, {} tokens"
            raise CheckpointError(
                f"these heads were trained for {c.target_name} ({sizes.format(*ours)}), the target is "
                f"{name_of(target)} ({sizes.format(*theirs)}); train heads "
                "for it with polyspec task=train"
            )


def name_of(target: Target) -> str:
    """The hub id of a target, the name of the folder it came from, or else its class."""
    name = target.model.name_or_path or ""
    name = Path(name).name if name and Path(name).is_dir() else name
    return name or type(target.model).__name__


M = TypeVar("M", bound=HeadModel)
MOST_WAITING = 64  # rounds whose hidden states are held until something is drafted


@cache
def _load(kind: type[HeadModel], folder: str, _changed: float) -> HeadModel:
    stored, _ = load(kind.config_class.get_config_dict, folder)
    expected = kind.config_class.model_type
    if stored.get("model_type") != expected:
        raise CheckpointError(
            f"{folder} holds a {stored.get('model_type')!r} checkpoint, this recipe needs {expected!r} heads"
        )
    model, report = load(kind.from_pretrained, folder, dtype="auto", output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = sorted(str(k) for k in (*report["missing_keys"], *report["mismatched_keys"]))
        raise CheckpointError(f"the heads in {folder} are incomplete: {lacking[0]} and {len(lacking) - 1} more lack")
    return model.eval()


def load_heads(kind: type[M], heads: M | str | PathLike[str]) -> M:
    """Heads of class `kind`: the object itself, or the folder (or hub id) of a checkpoint, read once.

    Raises CheckpointError for a folder that is missing, damaged, or holds something else; ConfigError for what is
    neither.
    """
    if isinstance(heads, kind):
        return heads
    if not isinstance(heads, str | PathLike):
        raise ConfigError(f"heads must be a {kind.__name__} or the folder of one, got {type(heads).__name__}")
    weights = Path(heads) / "model.safetensors"
    return _load(kind, str(heads), weights.stat().st_mtime if weights.exists() else 0.0)  # type: ignore[return-value]


def kind_of(heads: Any) -> str:
    """The model type of heads, a model or its folder; of anything else, its class."""
    if isinstance(heads, str | PathLike):
        return str(load(HeadModel.config_class.get_config_dict, str(heads))[0].get("model_type"))
    return getattr(getattr(heads, "config", None), "model_type", type(heads).__name__)


class TokenLayers:
    """The target's embedding and output layer as a head uses them, in the head's dtype and vocabulary.

    even: embeddings are divided by their root mean square."""

    def __init__(self, target: Target, vocab_map: Tensor | None, even: bool = False):
        # a target whose drafted tokens are not its input tokens (image codes, say) brings its own layers
        self.embedding = getattr(target, "embed", None) or target.model.get_input_embeddings()
        output = getattr(target, "output_layer", None) or target.model.get_output_embeddings()
        if output is None:
            raise UnsupportedModelError(f"{type(target.model).__name__} has no output layer that heads could share")
        self.output: Any = output
        self.vocab_map, self.vocab_size, self.dtype = vocab_map, target.vocab_size, target.model.dtype
        self.even = even
        self.rows: Frozen | None = None
        if vocab_map is not None and isinstance(output, nn.Linear):
            self.rows = derived(output, "rows", lambda: Frozen(rows_of(output, vocab_map)), vocab_map)

    def embed(self, tokens: Tensor) -> Tensor:
        """`[..]` target ids to `[.., d]`."""
        embedded = self.embedding(tokens)
        return functional.rms_norm(embedded, embedded.shape[-1:]) if self.even else embedded

    def logits(self, hidden: Tensor, of: Tensor | None = None) -> Tensor:
        """Hidden states `[.., d]` to logits `[.., V_d]` over the head's vocabulary, or over the target's ids `of [n]`."""
        if of is not None:
            bias = self.output.bias
            return functional.linear(hidden, self.output.weight[of], None if bias is None else bias[of])
        if self.rows is not None:
            return self.rows(hidden)
        logits = self.output(hidden)[..., : self.vocab_size]
        return logits if self.vocab_map is None else logits[..., self.vocab_map]

    def behind(self, inner: nn.Linear) -> Linear | None:
        """What the output layer makes of `inner`'s outputs as one matrix, in place of two; None if it is more than one
        itself. Without its bias."""
        if not isinstance(self.output, nn.Linear):
            return None
        chosen = slice(self.vocab_size) if self.vocab_map is None else self.vocab_map

        def product() -> Linear:
            weight = self.output.weight.detach()[chosen]
            return linear((weight.float() @ inner.weight.detach().float()).to(weight.dtype))

        ids = [] if self.vocab_map is None else [self.vocab_map]
        return derived(inner, "behind", product, self.output.weight, *ids)

    def own_ids(self, tokens: Tensor) -> Tensor:
        """Target ids `[..]` as ids of the head's vocabulary, -100 for tokens it does not predict."""
        if self.vocab_map is None:
            return tokens
        table = torch.full((self.vocab_size,), -100, device=tokens.device)
        table[self.vocab_map] = torch.arange(len(self.vocab_map), device=tokens.device)
        return table[tokens]

    def spread(self, logits: Tensor) -> Tensor:
        """Logits over the head's vocabulary `[.., V_d]` to the target's `[.., V]`, -inf where the head is silent."""
        if self.vocab_map is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.vocab_size), float("-inf"))
        full[..., self.vocab_map] = logits
        return full


class HeadDrafter(Generic[M]):
    """Base of the drafters that run a head on the target's hidden states, for ragged batches and under guidance."""

    kind: type[M]
    in_turn = False
    """Whether what is predicted at a position depends on the tokens drafted before it."""

    def __init__(self, heads: M | str | PathLike[str]):
        self.model = load_heads(self.kind, heads)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        return tuple(self.model.config.target_layers or ())

    @property
    def vocabulary(self) -> Tensor | None:
        """Ids of the tokens that are ever drafted `[V_d]`, on the target's device once begun; None for all."""
        return self.model.vocab_map

    def check(self, target: Target) -> None:
        """CheckpointError unless the heads fit `target`; to be asked before the target runs."""
        self.model.check(target)

    def bind(self, context: Context) -> None:
        """Start a run: the heads move to the target's device and dtype, and share its token layers."""
        self.check(context.target)
        target = context.target
        if (self.model.device, self.model.dtype) != (target.device, target.model.dtype):
            self.model.to(device=target.device, dtype=target.model.dtype)  # type: ignore[call-overload]
        self.context, self.target, self.sequences = context, target, context.sequences
        ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (self.model, target.model))
        context.stats.draft_ratio = ours / theirs
        self.layers = TokenLayers(target, self.model.vocab_map, self.model.config.even_embeddings)
        self.waiting: list[tuple[Tensor, ...]] = []
        self.prompt: tuple[tuple[Tensor, ...], list[int]] | None = None

    def remember(self, hidden: tuple[Tensor, ...], lengths: list[int]) -> None:
        """Take in hidden states `[S, T, d]` of the next T tokens of every stream, of which the target kept as many as bring
        it to `lengths [S]`."""
        raise NotImplementedError

    def take_prompt(self, hidden: tuple[Tensor, ...], lengths: list[int]) -> None:
        """`remember` the prompt's."""
        self.remember(hidden, lengths)

    def keep_prompt(self, hidden: tuple[Tensor, ...] | None) -> None:
        """The prompt waits for the first draft too: where drafting cannot pay, none is ever made."""
        self.prompt = self.prompt_hidden(hidden), self.target.cache_lengths

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        """Rounds that gain every row one token wait for the next draft: while none pays, none is prepared for."""
        one = hidden[0].shape[1] == 1
        if one:
            self.waiting.append(hidden)
        if not one or len(self.waiting) == MOST_WAITING:
            self.catch_up()
        if not one:
            self.remember(hidden, self.target.cache_lengths)

    def catch_up(self) -> None:
        """Take in what waits. To be called before anything is drafted."""
        if self.prompt is not None:
            prompt, self.prompt = self.prompt, None
            start = time.perf_counter()
            self.take_prompt(*prompt)
            spent = time.perf_counter() - start  # once a run, so no part of what drafts cost
            self.context.stats.prefill_seconds += spent
            self.context.stats.draft_seconds -= spent
        if self.waiting:
            hidden = tuple(torch.cat(layer, dim=1) for layer in zip(*self.waiting, strict=True))
            self.waiting.clear()
            self.remember(hidden, self.target.cache_lengths)

    def prompt_hidden(self, hidden: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """The prompt's hidden states `[S, P-1, d]`, zero for what a cache handed over by the caller already held."""
        lengths = self.target.cache_lengths
        if hidden is None:
            shape = (len(lengths), 0, self.model.config.target_hidden_size)
            hidden = (torch.zeros(shape, device=self.target.device, dtype=self.model.dtype),) * len(self.hidden_layers)
        return tuple(functional.pad(h, (0, 0, max(lengths) - h.shape[1], 0)) for h in hidden)

    def streams(self, rows: Tensor) -> Tensor:
        """`[B, ..]` per row to `[S, ..]` per stream of the target."""
        return rows if self.target.guidance is None else torch.cat([rows, rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """A head's output `[S, N, d]` to guided logits `[B, N, V]`, combined as the target combines its own."""
        return self.guided(self.layers.logits(hidden))

    def guided(self, logits: Tensor) -> Tensor:
        """Logits of every stream over the head's vocabulary `[S, N, V_d]` to guided ones `[B, N, V]`."""
        if (guidance := self.target.guidance) is not None:
            conditional, unconditional = logits.chunk(2)
            logits = guidance.combine(conditional, unconditional, guidance.scale)
        return self.layers.spread(logits)

    def draw(self, logits: Tensor) -> Draft:
        """Tokens from logits `[B, N, V]` of N independent positions, drawn as the target's tokens will be."""
        s, draws, processing = self.sequences, self.context.draws, self.context.processing
        if processing.history_free:
            scores = self.drawable(processing.scores(logits, s, s.tail(1)[:, :0]))
            return Draft(*draws.draft(scores, s.positions(logits.shape[1])))
        # what a position may hold depends on what was drawn before it
        return self.draw_in_turn(logits.shape[1], lambda i, token: logits[:, i : i + 1])

    def drawable(self, scores: Tensor) -> Tensor:
        """Scores `[B, T, V]` of which something can be drawn: where processors rule out all tokens that the heads predict,
        token 0, a certain draft like any other."""
        processing = self.context.processing
        if self.vocabulary is None or not (processing.processors or processing.constraint):
            return scores
        scores[..., 0].masked_fill_(scores.amax(-1) == -torch.inf, 0.0)  # in place: processors were given a copy
        return scores

    def draw_in_turn(self, count: int, predict: Callable[[int, Tensor], Tensor]) -> Draft:
        """The same, position by position: predict(i, token `[B, 1]` of the position before) gives logits `[B, 1, V]` of
        position i from 0. Fewer than `count` if the run's policy ends the draft."""
        s, context, positions = self.sequences, self.context, self.sequences.positions(count)
        token = s.tail(1)
        drafts, probs = token[:, :0], []
        for i in range(count):
            scores = self.drawable(context.processing.scores(predict(i, token), s, drafts, first=i))
            token, q = context.draws.draft(scores, positions[:, i : i + 1])
            token = token.clamp_min(0)  # -1 where the scores are NaN: the rule says so
            drafts = torch.cat([drafts, token], dim=1)
            probs.append(q)
            if not context.length.keep_drafting(scores):
                break
        return Draft(drafts, None if probs[0] is None else torch.cat(probs, dim=1))


def drafter_for(
    heads: HeadModel | str | PathLike[str], drafters: Sequence[type[HeadDrafter[Any]]], wanted: str
) -> HeadDrafter[Any]:
    """The one of `drafters` that is for `heads`, a model or its folder. ConfigError for heads of another kind, which begins
    with `wanted`."""
    found = kind_of(heads)
    for drafter in drafters:
        kind: type[HeadModel] = getattr(drafter, "kind")  # noqa: B009  a class variable of generic type to type checkers
        if kind.config_class.model_type == found:
            return drafter(heads)
    raise ConfigError(f"{wanted}, not by {found!r} heads")
