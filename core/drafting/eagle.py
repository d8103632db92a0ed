"""One decoder layer continues the target's features, token by token.

EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty, 2401.15077. With f_i the target's last hidden state
at token i and e its embedding, the head predicts the next feature from a feature and the token that was drawn from it,

    f̂_{i+1} = Layer(W_fc [e(x_{i+1}); f_i]),     q(x_{i+2}) = softmax(W_U f̂_{i+1}),

one Llama decoder layer under a causal mask, with a key-value cache of its own: entry i belongs to (f_i, x_{i+1}).
While drafting, predicted features stand in for the target's; after a round the kept entries are computed again from
true ones. Embedding and output layer W_U are the target's, shared and frozen. Exact under any exact rule.

With several `target_layers` the feature is W_fuse of them all, as in EAGLE-3 (2503.01840), where nothing holds the
prediction close to a target feature.
"""

from __future__ import annotations

import sys
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from polyspec.attention import grouped
from polyspec.cache import RaggedCache
from polyspec.drafting.base import Context, Draft
from polyspec.drafting.heads import HeadConfig, HeadDrafter, HeadModel
from polyspec.drafting.lean import LeanLayer, Turns, stacked
from polyspec.drafting.medusa import take
from polyspec.errors import ConfigError
from polyspec.laid_out import derived
from polyspec.target import Target, pack_rows
from polyspec.trees import Tree


class EagleConfig(HeadConfig):
    model_type = "polyspec_eagle"


class EagleModel(HeadModel):
    """The feature predictor, of the target's width. `for_target(model, target_layers=[…], intermediate_size=…)`."""

    config_class = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        width, count = config.target_hidden_size, len(config.target_layers or ())
        self.fuse = nn.Linear(count * width, width, bias=False) if count > 1 else nn.Identity()
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layer = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)
        self.post_init()

    @classmethod
    def default_sizes(cls, target: Target, sizes: dict[str, Any]) -> dict[str, Any]:
        depth = target.config.num_hidden_layers
        layers = list(sizes.pop("target_layers", [depth]))
        if not layers or not all(0 <= i <= depth for i in layers):
            raise ConfigError(f"target_layers must name hidden states 0 … {depth} of the target, got {layers}")
        if sizes.setdefault("hidden_size", target.config.hidden_size) != target.config.hidden_size:
            raise ConfigError("an EAGLE head predicts the target's features and has its width; leave hidden_size out")
        return {**super().default_sizes(target, sizes), "num_hidden_layers": 1, "target_layers": layers}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.fc:  # start from f̂_{i+1} ≈ f_i
            width = self.config.target_hidden_size
            start = torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1)
            initialization.copy_(self.fc.weight, start.to(self.fc.weight.dtype))

    def features(self, hidden: tuple[Tensor, ...]) -> Tensor:
        """The target's hidden states `[.., d]` per layer as one feature `[.., d]`."""
        return self.fuse(torch.cat(hidden, dim=-1))

    def forward(
        self, embedded: Tensor, features: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        """e(x_{i+1}) and f_i, `[S, T, d]` both, at `positions` i `[S or 1, T]` to f̂_{i+1} `[S, T, d]`.

        mask `[S or 1, 1, T, K]`: True = visible; None: a single query that sees everything.
        """
        x = self.fc(torch.cat([embedded, features], dim=-1))
        rope = self.rotary(x, positions)
        with grouped(self.config):
            return self.layer(x, attention_mask=mask, position_embeddings=rope, past_key_values=cache)


class LeanEagle:
    """An EagleModel's `forward` made ready for drafting: the same but for rounding, in a third of the operations."""

    def __init__(self, model: EagleModel):
        layer: Any = model.layer
        self.fc, self.dtype = stacked([model.fc]), model.fc.weight.dtype
        self.layer = LeanLayer(
            layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm), model.config
        )
        self.turns = Turns(model.config, model.fc.weight.device)

    def __call__(
        self,
        embedded: Tensor,
        features: Tensor,
        turns: Tensor,
        mask: Tensor | None,
        cache: RaggedCache,
        last: bool = False,
    ) -> Tensor:
        x = self.fc(torch.cat([embedded, features], dim=-1))
        return self.layer(x.float(), turns, mask, cache, last).to(self.dtype)


class Eagle(HeadDrafter[EagleModel]):
    """Drafts token by token, or level by level, with `heads`, an EagleModel or its folder."""

    kind = EagleModel
    reach = sys.maxsize

    def __init__(self, heads: EagleModel | str | PathLike[str]):
        super().__init__(heads)
        self.make_ready()

    def make_ready(self) -> None:
        self.lean = derived(self.model, "lean", lambda: LeanEagle(self.model))

    def begin(self, context: Context, hidden: tuple[Tensor, ...] | None) -> None:
        self.bind(context)
        self.make_ready()
        s, lengths = context.sequences, self.target.cache_lengths
        self.cache = RaggedCache(len(lengths), s.limit + 32)
        self.predicted = torch.zeros(
            len(lengths), 1, self.model.config.target_hidden_size, device=s.device, dtype=self.model.dtype
        )
        if max(lengths) > 0:
            self.keep_prompt(hidden)

    def take_prompt(self, hidden: tuple[Tensor, ...], lengths: list[int]) -> None:
        s = self.sequences
        prompt = s.tokens[:, : s.prompt_length]
        mask = (torch.arange(s.prompt_length, device=s.device) >= s.pad_tensor[:, None]).long()
        if self.target.guidance is not None:
            prompt, mask = self.target.with_unconditional(prompt, mask)
        tokens, _ = pack_rows(prompt, mask)
        self.extend(tokens[:, 1:], hidden, lengths)

    def extend(self, tokens: Tensor, hidden: tuple[Tensor, ...], kept: list[int]) -> None:
        """Entries (f_i, x_{i+1}) from the target's hidden states `[S, T, d]` and the tokens that followed `[S, T]`; as
        many stay as bring the rows to the lengths `kept`, and the last one's prediction is where drafting starts."""
        width = tokens.shape[1]
        last = [new - old - 1 for new, old in zip(kept, self.cache.lengths, strict=True)]
        features = self.model.features(hidden)
        if self.cache.uniform and min(last) == width - 1:
            # the last entry sees all others, and only its prediction is asked for
            turns = self.lean.turns.behind(self.cache, width)
            self.predicted = self.lean(self.layers.embed(tokens), features, turns, None, self.cache, last=True)
        else:
            self.predicted = take(self.step(tokens, features), torch.tensor(last, device=tokens.device))[:, None]
        self.cache.rollback(kept)

    def step(self, tokens: Tensor, features: Tensor, tree: Tree | None = None) -> Tensor:
        """T entries `[S, T]` behind those in the cache, to their predicted features `[S, T, d]`; with a tree, its last
        T nodes. The entry of the last committed token is the tree's root."""
        width = tokens.shape[1]
        if width == 1 and tree is None and self.cache.uniform:
            turns, mask = self.lean.turns.behind(self.cache, 1), None
        else:
            at = self.cache.layout(width, tree, tokens.device)
            turns, mask = self.lean.turns.upto(self.cache.longest + width)[at.base + at.depth], at.visible[:, None]
        return self.lean(self.layers.embed(tokens), features, turns, mask, self.cache)

    def root(self) -> Tensor:
        self.catch_up()
        self.kept, self.reached = self.cache.lengths, self.predicted
        self.context.stats.draft_calls += 1
        return self.logits(self.predicted)

    def level(self, tokens: Tensor, tree: Tree) -> Tensor:
        above = self.streams(tree.parents[:, -tokens.shape[1] :] + 1)
        features = self.reached.gather(1, above[..., None].expand(-1, -1, self.reached.shape[-1]))
        out = self.step(self.streams(tokens), features, tree)
        self.cache.rollback([n + tree.size for n in self.kept])
        self.reached = torch.cat([self.reached, out], dim=1)
        self.context.stats.draft_calls += 1
        return self.logits(out)

    def rollback(self) -> None:
        self.cache.rollback(self.kept)

    def propose(self, count: int) -> Draft:
        self.catch_up()
        feature, kept = self.predicted, self.cache.lengths

        def predict(i: int, token: Tensor) -> Tensor:
            nonlocal feature
            if i > 0:
                feature = self.step(self.streams(token), feature)
                self.cache.rollback([n + i for n in kept])
            self.context.stats.draft_calls += 1
            return self.logits(feature)

        draft = self.draw_in_turn(count, predict)
        self.cache.rollback(kept)
        return draft

    def remember(self, hidden: tuple[Tensor, ...], lengths: list[int]) -> None:
        s, width = self.sequences, hidden[0].shape[1]
        start = torch.tensor(self.cache.lengths[: s.batch], device=s.device) + s.pad_tensor + 1
        columns = start[:, None] + torch.arange(width, device=s.device)
        self.extend(self.streams(s.tokens.gather(1, columns.clamp(max=s.limit))), hidden, lengths)
