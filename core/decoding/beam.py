"""Constrained beam search for lists: all beams of all rows in one forward under an ancestor mask, several levels a round.

After AtSpeed, 2410.05165. Every sequence of a trie has D tokens (an item's semantic ID, say). A row keeps its K best
prefixes; a round drafts γ further levels of N ≥ K beams each, scores them all in one forward, and goes through them level
by level: a rule picks the next K beams among what may follow the surviving ones, and goes on if they were drafted. A round
so gains 1 … γ+1 levels; with γ = 0 it is plain beam search.

A prompt is in the cache once, whatever the number of beams: nodes of the trie hang behind it, each attending to the prompt
and to its own ancestors. Nothing is ever moved: a node that did not survive is simply seen by nobody. All rows have equal
numbers of slots, so rows with shorter prompts, fewer beams or fewer levels left cost padding, never a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.cache import Layout
from polyspec.decoding.search import Beams, ByGumbel, Search
from polyspec.decoding.worth import Worth
from polyspec.drafting.base import NoDraft
from polyspec.errors import ConfigError, InputError, UnsupportedModelError
from polyspec.lengths import positive
from polyspec.metrics import DecodingStats
from polyspec.target import Target
from polyspec.trie import Trie
from polyspec.verification import TopK

MOST_LEVELS = 8  # where searches decide themselves
MOST_LEFT = 0.75  # with no more of the rows left than that, copying their cache pays


class BeamCache:
    """A target whose cache holds the prompts of a search and, behind them, nodes of its trie.

    Slots 0 … P-2 hold the prompts but for their last tokens, slot P-1 (`root`) those; nodes follow in the order in which
    they are fed. A node's `path [B, T, D]` are the slots of its ancestors and its own, filled up with the root's.
    """

    def __init__(self, target: Target, search: Search):
        self.target, self.search = target, search
        device, (rows, width) = search.prompts.device, search.prompts.shape
        self.root = width - 1
        self.base = torch.tensor(search.lengths, device=device)[:, None] - 1
        columns = torch.arange(width - 1, device=device)
        self.prompt_depth = functional.pad(columns - self.base, (0, 1))  # negative before the root
        self.in_prompt = functional.pad(columns < self.base, (0, 1), value=True)
        self.depth = self.prompt_depth
        self.size = 0
        target.open(rows, width + 4 * search.most * search.trie.depth)

    def feed(self, node: Tensor, path: Tensor, depth: Tensor, wanted: int) -> Tensor:
        """Logits `[B, wanted, V]` behind the last `wanted` of nodes `[B, T]` at `depth [B, T]` (the root's is 0), whose
        own slots begin at `next`. The first call feeds the prompts as well; the root then counts as one before the T."""
        search, first, (rows, new) = self.search, self.size == 0, node.shape
        tokens = search.trie.token[node]
        visible = self.in_prompt[:, None, :].repeat(1, new, 1)
        held = self.size or self.root + 1
        visible = functional.pad(visible, (0, held + new - visible.shape[2])).scatter_(2, path, True)
        if first:
            tokens = torch.cat([search.prompts, tokens], dim=1)
            slots = torch.arange(held, device=node.device)
            causal = (slots <= slots[:, None]).repeat(rows, 1, 1)
            causal[:, -1] = self.in_prompt
            visible = torch.cat([functional.pad(causal, (0, new)), visible], dim=1)
        self.depth = torch.cat([self.depth, depth], dim=1)
        query = self.depth[:, -tokens.shape[1] :]
        output = self.target.forward(tokens, Layout(self.base, query, self.depth, visible), wanted)
        self.size, self.hidden = held + new, output.hidden
        self.target.rollback([self.size] * rows)
        return output.logits

    @property
    def next(self) -> int:
        """The slot of the next node to be fed."""
        return self.size or self.root + 1

    def own(self, path: Tensor, level: Tensor, start: int) -> Tensor:
        """`path [B, W, D]` with W consecutive slots from `start` entered as the slots of their nodes, which are the
        `level [B]`-th tokens of their sequences (from 0)."""
        width = path.shape[1]
        slots = torch.arange(start, start + width, device=path.device).expand(len(path), -1)
        at = level.clamp(0, path.shape[2] - 1)[:, None, None].expand(-1, width, 1)
        return path.scatter(2, at, slots[..., None])

    def no_path(self, width: int) -> Tensor:
        """Paths `[B, width, D]` of nodes without ancestors."""
        shape = (len(self.base), width, self.search.trie.depth)
        return torch.full(shape, self.root, device=self.base.device)

    def keep(self, index: Tensor, rows: list[int]) -> None:
        """Go on with only the given rows, which are the search's now."""
        assert self.target.cache is not None
        self.target.cache.select_rows(index, rows)
        self.base, self.in_prompt = self.base[index], self.in_prompt[index]
        self.prompt_depth, self.depth = self.prompt_depth[index], self.depth[index]

    def rewind(self) -> None:
        """Forget all nodes."""
        self.size, self.depth = self.root + 1, self.prompt_depth
        self.target.rollback([self.size] * len(self.base))


@dataclass(frozen=True, slots=True)
class DraftLevel:
    """One drafted level: N nodes `[B, N]` (0: none), each `under [B, N]` the under-th node of the level before, which for
    the first is the search's beams. q `[B, W · C]`: probabilities of all W · C candidates of that level, from which the
    nodes were drawn, or None if they are simply the best."""

    node: Tensor
    under: Tensor
    q: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BeamContext:
    """What a run shares: the target, the rows, and the counts of the run."""

    target: Target
    search: Search
    stats: DecodingStats


class BeamDrafter(Protocol):
    """Drafts levels of a search; begun for every run."""

    hidden_layers: tuple[int, ...]

    def check(self, target: Target) -> None:
        """Raise a PolyspecError if this cannot draft for `target`. Asked before the target runs."""
        ...

    def begin(self, context: BeamContext) -> None:
        """Start a run."""
        ...

    def propose_levels(self, count: int) -> list[DraftLevel]:
        """At most `count` ≥ 1 levels below the search's beams."""
        ...

    def observe(self, hidden: tuple[Tensor, ...]) -> None:
        """After the target's forward: its hidden states `[B, T, d]` of all it was fed, per layer asked for; the first
        time those of the prompts, as packed, and of what was drafted."""
        ...

    def keep(self, index: Tensor, rows: list[int]) -> None:
        """Go on with only the given rows, which are the search's now."""
        ...


class Beam:
    """Beam search for K sequences of a trie, with drafts checked by `rule` (`strict_topk`, `relaxed_topk`).

    levels: γ, the most levels drafted in a round, 0 for none, "auto" for all or none, as searches before show to be the
    faster (beside a small target a drafter may cost more than it saves); lists drawn with a seed are always drafted. Never
    more than would help.
    """

    def __init__(self, rule: Callable[..., TopK], levels: int | str = 8):
        self.rule = rule
        self.worth = Worth() if levels == "auto" else None
        most: Any = MOST_LEVELS if levels == "auto" else levels
        self.levels = 0 if most == 0 else positive("levels", most)

    def check(self, target: Target, drafter: BeamDrafter | NoDraft) -> None:
        """Raise a PolyspecError if `target` cannot hold beams or there is no drafter to draft with."""
        if self.levels and isinstance(drafter, NoDraft):
            raise ConfigError("this recipe drafts: give draft_model=… or heads=…; without them use 'autoregressive'")
        if target.lockstep or target.model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{type(target.model).__name__} counts positions along the cache, where beams lie side by side; choose a "
                "decoder-only model with rotary or learnt positions"
            )
        drafter.check(target)

    def run(self, context: BeamContext, drafter: BeamDrafter | NoDraft) -> None:
        """Search until every row's beams are whole sequences."""
        seeded = isinstance(context.search.ranking, ByGumbel)  # has to come out the same again to the last digit
        if self.worth is None or seeded or isinstance(drafter, NoDraft):
            self.find(context, None if isinstance(drafter, NoDraft) or self.levels == 0 else drafter)
            return
        size = len(context.search.lengths), context.search.most
        drafts, start = self.worth.drafts(*size), time.perf_counter()
        self.find(context, drafter if drafts else None)
        self.worth.note(*size, drafts, time.perf_counter() - start)

    def find(self, context: BeamContext, drafting: BeamDrafter | None) -> None:
        search, stats = context.search, context.stats
        if drafting is not None:
            context.target.hidden_layers = tuple(drafting.hidden_layers)
            with stats.timed("draft"):
                drafting.begin(context)
        cache = BeamCache(context.target, search)
        path = cache.no_path(1)  # of the beams' ancestors, in the target's cache
        while not search.finished:
            count, draft = min(self.levels, search.remaining - 1), []
            if drafting is not None and count > 0:
                with stats.timed("draft"):
                    draft = drafting.propose_levels(count)
            with stats.timed("target"):
                logits, paths = self.score(cache, search, draft, path)
            with stats.timed("verify"):
                gained, path = self.verify(search, draft, logits, paths)
            if drafting is not None:
                with stats.timed("draft"):
                    drafting.observe(cache.hidden)
            stats.record(len(draft), gained, sum(level.node.shape[1] for level in draft))
            rows = search.running
            if 0 < len(rows) <= MOST_LEFT * len(gained):
                index = search.keep(rows)
                path = path[index, : search.most]
                cache.keep(index, rows)
                if drafting is not None:
                    drafting.keep(index, rows)
        search.settle()

    def score(
        self, cache: BeamCache, search: Search, draft: list[DraftLevel], path: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One target forward over the beams and their drafts: logits `[B, W_i, V]` and paths `[B, W_i, D]` a level."""
        level, node = torch.tensor(search.levels, device=search.prompts.device), search.beams.node
        begun = cache.size > 0  # else the only beam is the root, which is part of its prompt
        paths = [cache.own(path, level - 1, cache.next) if begun else path]
        nodes, depths, start = [node], [level[:, None].expand_as(node)], cache.next + node.shape[1] * begun
        for ahead, drafted in enumerate(draft):
            inherited = paths[-1].gather(1, drafted.under[..., None].expand(-1, -1, path.shape[2]))
            paths.append(cache.own(inherited, level + ahead, start))
            nodes.append(drafted.node)
            depths.append((level + ahead + 1)[:, None].expand_as(drafted.node))
            start += drafted.node.shape[1]
        widths, skip = [p.shape[1] for p in paths], int(not begun)
        node, where, depth = (torch.cat(x, dim=1)[:, skip:] for x in (nodes, paths, depths))
        logits = cache.feed(node, where, depth, sum(widths))
        return list(logits.split(widths, dim=1)), paths

    def verify(
        self, search: Search, draft: list[DraftLevel], logits: list[Tensor], paths: list[Tensor]
    ) -> tuple[list[int], Tensor]:
        """Go through the scored levels, and commit: levels gained a row, and the paths of the new beams' ancestors.

        The round's one host synchronisation is here."""
        device, depth, most = search.prompts.device, search.trie.depth, search.most
        level = torch.tensor(search.levels, device=device)
        k = torch.tensor(search.widths, device=device)
        active, gained, sick = level < depth, torch.zeros_like(level), torch.zeros_like(level, dtype=torch.bool)
        beams, found, found_path = search.beams, search.beams, paths[0]
        kept = torch.arange(beams.node.shape[1], device=device).expand(len(level), -1)
        for ahead, (scores, path) in enumerate(zip(logits, paths, strict=True)):
            path = path.gather(1, kept[..., None].expand(-1, -1, depth))
            scores = scores.gather(1, kept[..., None].expand(-1, -1, scores.shape[2])) if ahead else scores
            branching = search.branching(ahead)
            candidates = search.expand(beams, scores, branching)
            sick |= active & candidates.score.isnan().any(1)
            width = paths[ahead].shape[1]
            drafted, q = candidates_of(search.trie, draft[ahead : ahead + 1], beams, kept, width, branching)
            verdict = self.rule(drafted, q, candidates.key, k=k, most=most, generator=search.generator)
            after = candidates.take(verdict.chosen)
            onward = path.gather(1, (verdict.chosen.clamp(min=0) // branching)[..., None].expand(-1, -1, depth))
            found, found_path = replace(found, after, active), replace_rows(found_path, onward, active)
            gained += active
            active = active & verdict.accepted & (level + ahead + 1 < depth)
            beams, kept = after, verdict.source.clamp(min=0)
        steps, bad = torch.stack([gained, sick.long()]).tolist()
        if any(bad):
            raise InputError(f"the target's scores for row {bad.index(1)} are NaN; check the weights and the dtype")
        search.beams, search.levels = found, [n + g for n, g in zip(search.levels, steps, strict=True)]
        return steps, found_path


def candidates_of(
    trie: Trie, draft: list[DraftLevel], beams: Beams, kept: Tensor, width: int, branching: int
) -> tuple[Tensor, Tensor | None]:
    """Drafted nodes as indices `[B, N]` among the candidates of `beams` (-1: under none of them), and the probabilities of
    those candidates under the drafter. kept `[B, W]`: where the beams are in the level above, which has `width` nodes."""
    if not draft:
        return kept[:, :0], None
    (level,) = draft
    there = kept.new_full((len(kept), width + 1), -1)
    index = torch.where(beams.score > -torch.inf, kept, width)
    there.scatter_(1, index, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    above = there[:, :width].gather(1, level.under)
    parent = beams.node.gather(1, above.clamp(min=0))
    candidate = above * branching + level.node - trie.first[parent]
    # what a row that has ended its round holds need not fit together any more
    fits = (above >= 0) & (level.node > 0) & (trie.parent[level.node] == parent)
    candidate = torch.where(fits, candidate, -1)
    if level.q is None:
        return candidate, None
    q = level.q.unflatten(1, (width, branching)).gather(1, kept[..., None].expand(-1, -1, branching))
    return candidate, q.flatten(1)


def replace(old: Beams, new: Beams, rows: Tensor) -> Beams:
    """`new` in the rows `[B]` bool, `old` elsewhere; `new` everywhere if the widths differ, as after the root."""
    return Beams(*(replace_rows(*x, rows) for x in ((old.node, new.node), (old.score, new.score), (old.key, new.key))))


def replace_rows(old: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    if old.shape != new.shape:
        return new
    return torch.where(rows.view(-1, *[1] * (new.ndim - 1)), new, old)
