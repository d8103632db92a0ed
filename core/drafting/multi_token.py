"""Heads that predict several tokens from one hidden state, for decoders of speech.

Raj et al., "Faster Speech-LLaMA Inference with Multi-token Prediction", 2409.08148. With h_t the decoder's last hidden state,
head k predicts token t+1+k independently of the others, in one of two forms:

    projection:  q_k = softmax(W_k h_t)             K output matrices of their own
    latent:      q_k = softmax(W_U (M_k h_t))       K full-rank d×d maps, the un-embedding shared

Drafts come with the heads' probabilities at temperature 0 too, which `polyspec.verification.multi_token` asks for.
Instead of head by head, the tokens can be chosen together: see `polyspec.drafting.viterbi`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from polyspec.drafting.base import Context, Draft
from polyspec.drafting.heads import HeadConfig, HeadDrafter, HeadModel
from polyspec.drafting.medusa import take
from polyspec.drafting.viterbi import best_path, transitions
from polyspec.errors import ConfigError, unknown
from polyspec.laid_out import laid_out, using
from polyspec.lengths import positive
from polyspec.target import Target, make_target

FORMS = ("projection", "latent")


class MultiTokenConfig(HeadConfig):
    """`heads` is K; `form` is one of `FORMS`."""

    model_type = "polyspec_multi_token"
    heads: int = 4
    form: str = "latent"
    transitions: bool = False  # whether the heads know which token follows which


class MultiTokenModel(HeadModel):
    """K heads side by side. `for_target(model, heads=…, form=…)` begins with the target's own output layer, M_k = I."""

    config_class = MultiTokenConfig
    config: MultiTokenConfig
    log_transitions: Tensor | None

    def __init__(self, config: MultiTokenConfig):
        super().__init__(config)
        width = config.target_hidden_size
        out = width if config.form == "latent" else config.vocab_size
        self.maps = nn.Linear(width, config.heads * out, bias=False)
        size = config.target_vocab_size
        self.register_buffer("log_transitions", torch.zeros(size, size) if config.transitions else None)
        self.post_init()

    def fit_transitions(self, rows: Iterable[Sequence[int] | Tensor], smoothing: float = 0.1) -> None:
        """Count which token follows which in token lists `rows`, for Viterbi selection; saved with the heads."""
        self.log_transitions = transitions(rows, self.config.target_vocab_size, smoothing).to(self.device)
        self.config.transitions = True

    @classmethod
    def for_target(cls, target: Target | PreTrainedModel, **sizes: Any) -> Self:
        target = make_target(target) if isinstance(target, PreTrainedModel) else target
        model = super().for_target(target, **sizes)
        layer: Any = getattr(target, "output_layer", None) or target.model.get_output_embeddings()
        if model.config.form == "projection" and isinstance(layer, nn.Linear):
            rows = layer.weight.detach()[: target.vocab_size]
            rows = rows if model.vocab_map is None else rows[model.vocab_map.to(rows.device)]
            with torch.no_grad():
                model.maps.weight.copy_(rows.repeat(model.config.heads, 1))
        return model

    @classmethod
    def default_sizes(cls, target: Target, sizes: dict[str, Any]) -> dict[str, Any]:
        if sizes.get("heads", 4) < 1:
            raise ConfigError(f"heads must be ≥ 1, got {sizes['heads']}")
        if sizes.get("form", "latent") not in FORMS:
            raise unknown("form of heads", str(sizes["form"]), FORMS)
        return {**super().default_sizes(target, sizes), "target_layers": [target.config.num_hidden_layers]}

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.maps and self.config.form == "latent":
            width = self.config.target_hidden_size
            initialization.copy_(self.maps.weight, torch.eye(width).repeat(self.config.heads, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Last hidden states `[.., d]` to what the target's output layer reads for each head `[.., K, d]`; in the form of
        projections to logits `[.., K, V_d]`."""
        return self.maps(hidden).unflatten(-1, (self.config.heads, -1))


class MultiToken(HeadDrafter[MultiTokenModel]):
    """Drafts at most K tokens from one hidden state with `heads`, a MultiTokenModel or its folder.

    viterbi: choose the tokens together, among this many of each head; None: each by itself. Such a draft is certain, and
    the heads' probabilities only go along if the rule keeps tokens by them, by their `threshold`. ConfigError for heads
    without transitions.
    """

    kind = MultiTokenModel

    def __init__(self, heads: Any, viterbi: int | None = None, threshold: float | None = None):
        super().__init__(heads)
        self.viterbi = None if viterbi is None else positive("viterbi", viterbi)
        self.threshold = threshold
        if self.viterbi is not None and self.model.log_transitions is None:
            raise ConfigError("viterbi needs heads that know which token follows which: call fit_transitions on them")

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.bind(context)
        self.linears = laid_out(self.model)
        (last,) = self.prompt_hidden(hidden)
        self.hidden = last.new_zeros(last.shape[0], last.shape[2])
        if last.shape[1]:
            self.hidden = take(last, torch.tensor(self.target.cache_lengths, device=last.device) - 1)

    def block(self, count: int) -> Tensor:
        """Logits `[B, n, V]` of the next n ≤ `count` positions."""
        self.context.stats.draft_calls += 1
        with using(self.linears):
            out = self.model(self.hidden)[:, :count]
        return self.logits(out) if self.model.config.form == "latent" else self.guided(out)

    def propose(self, count: int) -> Draft:
        logits = self.block(count)
        if self.viterbi is not None:
            return self.together(logits)
        draft = self.draw(logits)
        return Draft(draft.tokens, logits.float().softmax(-1) if draft.probs is None else draft.probs)

    def together(self, logits: Tensor) -> Draft:
        """The best path through heads of logits `[B, N, V]`, processed where that does not take the path itself."""
        processing, s = self.context.processing, self.sequences
        scores = processing.scores(logits, s, s.tail(1)[:, :0]) if processing.history_free else logits.float()
        assert self.viterbi is not None and self.model.log_transitions is not None
        log_a = self.model.log_transitions.to(scores)
        tokens = best_path(scores.log_softmax(-1), log_a, s.tail(1)[:, 0], self.viterbi)
        return Draft(tokens, None if self.threshold is None else scores.softmax(-1))

    def observe(self, hidden: tuple[Tensor, ...], accepted: Tensor) -> None:
        self.hidden = take(hidden[0], self.streams(accepted))
