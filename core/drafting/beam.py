"""Drafts for constrained beam search: further levels of beams, from a separate model (here) or heads (`beam_heads`).

After AtSpeed, 2410.05165: the drafter runs a beam search of its own over the same trie, N ≥ K beams wide, from the K beams
that the target settled, and ranks by the target's cumulative score of those plus its own of what it adds.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from polyspec.decoding.beam import BeamCache, BeamContext, DraftLevel
from polyspec.decoding.search import Beams
from polyspec.drafting.draft_model import DraftModel
from polyspec.errors import ConfigError
from polyspec.target import Target, make_target


class LevelBeams:
    """The beam search of a drafter; a subclass says what may follow its beams.

    spread: N = spread · K beams a level, rounded up. Of these K are what the drafter takes for the target's next beams,
    its own best under the K it took for that a level above; the others are the best of what is left. (The best N of all
    would let children of wrong guesses crowd out those of right ones.) temperature: N draws without replacement from
    the softmax of all candidates' scores by it instead, for rules that need to know what was drawn from; None: the best.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, spread: float = 2.0, temperature: float | None = None):
        if isinstance(spread, bool) or not isinstance(spread, int | float) or not 1 <= spread <= 100:
            raise ConfigError(f"spread must lie in [1, 100], the drafted beams for each of the K; got {spread!r}")
        if temperature is not None and not temperature > 0:
            raise ConfigError(f"temperature must be > 0, got {temperature!r}")
        self.spread, self.temperature = spread, temperature

    def check(self, target: Target) -> None: ...

    def begin(self, context: BeamContext) -> None:
        self.context, self.search = context, context.search
        self.widen()

    def keep(self, index: Tensor, rows: list[int]) -> None:
        self.widen()

    def widen(self) -> None:
        """Take over the rows' numbers of beams."""
        widths = self.search.widths
        self.extra = [math.ceil(self.spread * k) - k for k in widths]
        self.limits = torch.tensor([widths, self.extra], device=self.search.prompts.device)[..., None]

    def first_logits(self) -> Tensor:
        """Logits `[B, W, V]` behind the search's beams."""
        raise NotImplementedError

    def next_logits(self, beams: Beams, under: Tensor, ahead: int) -> Tensor:
        """Logits `[B, N, V]` behind the drafted `beams` of level `ahead` (from 0), each `under` one of the level before."""
        raise NotImplementedError

    def observe(self, hidden: tuple[Tensor, ...]) -> None: ...

    def propose_levels(self, count: int) -> list[DraftLevel]:
        search, beams, logits = self.search, self.search.beams, self.first_logits()
        levels: list[DraftLevel] = []
        guessed = beams.node.shape[1]  # how many of the level's beams may be the target's
        for ahead in range(count):
            branching = search.branching(ahead)
            candidates = search.expand(beams, logits, branching)
            q = None
            if self.temperature is not None:
                q, index = self.sample(candidates.key / self.temperature)
            else:
                index = self.likeliest(candidates.key, guessed * branching)
                guessed = min(search.most, guessed * branching)
            beams = candidates.take(index)
            levels.append(DraftLevel(beams.node, index.clamp(min=0) // branching, q))
            if ahead + 1 < count:
                logits = self.next_logits(beams, levels[-1].under, ahead)
        return levels

    def likeliest(self, key: Tensor, guessed: int) -> Tensor:
        """Candidates `[B, N]` of keys `[B, C]`: the best K of the first `guessed`, then the best of the others."""
        first = best(key[:, :guessed], self.limits[0], self.search.most)
        others = key.scatter(1, torch.where(first < 0, first[:, :1], first).clamp(min=0), -torch.inf)
        return torch.cat([first, best(others, self.limits[1], max(self.extra))], dim=1)

    def sample(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """q `[B, C]` of candidates with keys `[B, C]`, and draws `[B, N]` from it without replacement."""
        log_q = key.log_softmax(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        u = torch.rand(key.shape, generator=self.search.generator, device=key.device).clamp(1e-20, 1 - 6e-8)
        counts = self.limits.sum(0)
        return log_q.exp(), best(log_q - (-u.log()).log(), counts, self.search.most + max(self.extra))


def best(key: Tensor, counts: Tensor, most: int) -> Tensor:
    """Indices `[B, most or C]` of the best `counts [B, 1]` of `key [B, C]`; -1 beyond, and where the key is -inf."""
    top = key.topk(min(most, key.shape[1]), dim=1)
    ranks = torch.arange(top.indices.shape[1], device=key.device)
    return torch.where((ranks < counts) & (top.values > -torch.inf), top.indices, -1)


class ModelBeams(LevelBeams):
    """Drafts with `draft_model`, a smaller model with the target's tokens, or its folder; see `DraftModel`.

    Its cache keeps the prompts only: a round begins by feeding the prefixes of the search's beams, at most K · D tokens.
    """

    def __init__(
        self, draft_model: PreTrainedModel | str | PathLike[str], spread: float = 2.0, temperature: float | None = None
    ):
        super().__init__(spread, temperature)
        self.inner = DraftModel(draft_model)

    def check(self, target: Target) -> None:
        self.inner.check(target)
        if self.inner.draft_target.lockstep or self.inner.model.config.is_encoder_decoder:
            raise ConfigError(
                "the draft model must be a decoder-only model with rotary or learnt positions, to hold beams side by side"
            )
        if self.inner.draft_target.vocab_size < target.vocab_size:
            raise ConfigError(
                f"the draft model has {self.inner.draft_target.vocab_size} tokens, the target {target.vocab_size}; beams "
                "need a draft model that knows every item token"
            )

    def begin(self, context: BeamContext) -> None:
        super().begin(context)
        if self.inner.loaded:
            self.inner.model.to(context.target.device)  # type: ignore[arg-type]
        if self.inner.model.device != context.target.device:
            raise ConfigError(f"the draft model is on {self.inner.model.device}, the target on {context.target.device}")
        self.cache = BeamCache(make_target(self.inner.model), self.search)

    def keep(self, index: Tensor, rows: list[int]) -> None:
        super().keep(index, rows)
        self.cache.keep(index, rows)

    def feed(self, *arguments: Any) -> Tensor:
        self.context.stats.draft_calls += 1
        return self.cache.feed(*arguments)

    def first_logits(self) -> Tensor:
        search, cache, node = self.search, self.cache, self.search.beams.node
        self.level = torch.tensor(search.levels, device=node.device)
        none = node[:, :0]
        if cache.size == 0:
            logits = self.feed(none, cache.no_path(0), none, 1)
            if max(search.levels) == 0:
                self.path = cache.no_path(1)
                return logits
        cache.rewind()
        above = [node]
        for _ in range(max(search.levels) - 1):
            above.insert(0, search.trie.parent[above[0]])
        width, path, paths, depths = node.shape[1], cache.no_path(node.shape[1]), [], []
        for block, _ in enumerate(above):
            depth = self.level - (len(above) - 1 - block)  # rows that are behind have no node here
            inside = cache.own(path, depth - 1, cache.next + block * width)
            path = torch.where((depth > 0)[:, None, None], inside, path)
            paths.append(path)
            depths.append(depth.clamp(min=0)[:, None].expand(-1, width))
        self.path = path
        return self.feed(torch.cat(above, 1), torch.cat(paths, 1), torch.cat(depths, 1), width)

    def next_logits(self, beams: Beams, under: Tensor, ahead: int) -> Tensor:
        inherited = self.path.gather(1, under[..., None].expand(-1, -1, self.path.shape[2]))
        self.path = self.cache.own(inherited, self.level + ahead, self.cache.next)
        depth = (self.level + ahead + 1)[:, None].expand_as(beams.node)
        return self.feed(beams.node, self.path, depth, beams.node.shape[1])
