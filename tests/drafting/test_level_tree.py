"""Trees drafted level by level: the logits are those of each path on its own, and the shape is the one promised."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, build, noisy_copy, target
from torch import Tensor

import polyspec
from polyspec.cache import Layout, RaggedCache
from polyspec.decoding.sequences import Sequences
from polyspec.distributions import Greedy, Independent, Processing
from polyspec.drafting.base import Context, Draft
from polyspec.drafting.draft_model import DraftModel
from polyspec.drafting.eagle import Eagle, EagleModel
from polyspec.drafting.level_tree import LevelTree, LikeliestTree, SampledTree
from polyspec.guidance import guide_log_probs
from polyspec.lengths import Fixed
from polyspec.metrics import DecodingStats
from polyspec.trees import Tree, sequoia

NEW_TOKENS = 12
RATES = [0.6, 0.2, 0.1]


def prompts() -> dict[str, Tensor]:
    """Prompts of 9, 6 and 2 tokens, padded on the left."""
    ids = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :7] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(recipe: str, drafter: Callable[[], Any], family: str = "llama", length: int = 3, **options: Any) -> Any:
    """Decode with `drafter()` in the loop of `recipe`; the stats of the run."""
    needs = {need: drafter_parts(need, family) for need in polyspec.recipe.find_recipe(recipe).needs}
    fast = polyspec.custom_generate(recipe, seed=0, length=length, **needs)
    fast.method = replace(fast.method, drafter=drafter)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0, **options}
    target(family).generate(**prompts(), custom_generate=fast, **settings)
    return fast.stats


def drafter_parts(need: str, family: str) -> Any:
    return EagleModel.for_target(target(family)) if need == "heads" else noisy_copy(target(family), 0.2)


SHAPES: dict[str, Callable[..., LevelTree]] = {
    "likeliest": lambda inner, **needs: LikeliestTree(inner, nodes=8, width=3, **needs),
    "sampled": lambda inner, **needs: SampledTree(inner, nodes=8, acceptance_by_rank=RATES, **needs),
}


# -- the logits of a level -------------------------------------------------------------------------------------------


def paths(tokens: Tensor, tree: Tree, row: int) -> list[list[int]]:
    """The tokens from the root's child down to each of the last nodes of `row`."""
    parents, out = tree.parents[row].tolist(), []
    for node in range(tree.size - tokens.shape[1], tree.size):
        lineage = []
        while node >= 0:
            lineage.append(node)
            node = parents[node]
        out.append(lineage[::-1])
    return out


class WatchedModel(DraftModel):
    """Compares the logits of every level with those of a plain forward pass over each path."""

    compared = 0

    def root(self) -> Tensor:
        self.tokens: list[Tensor] = []
        return super().root()

    @torch.no_grad()
    def level(self, tokens: Tensor, tree: Tree) -> Tensor:
        logits, s, guidance = super().level(tokens, tree), self.context.sequences, self.draft_target.guidance
        self.tokens.append(tokens)
        drafted = torch.cat(self.tokens, dim=1)
        for row in range(s.batch):
            own = s.tokens[row, s.pads[row] : s.lengths[row]]
            for column, path in enumerate(paths(tokens, tree, row)):
                ids = torch.cat([own, drafted[row, path]])[None]
                expected = self.model(ids).logits[0, -1]
                if guidance is not None:
                    other = self.model(ids[:, s.prompt_length - s.pads[row] - 1 :]).logits[0, -1]
                    expected = guide_log_probs(expected, other, guidance.scale)
                torch.testing.assert_close(logits[row, column], expected, rtol=1e-4, atol=1e-4)
                WatchedModel.compared += 1
        return logits


class WatchedEagle(Eagle):
    """Compares the logits of every level with those of the head going down each path token by token."""

    compared = 0

    def root(self) -> Tensor:
        self.tokens: list[Tensor] = []
        return super().root()

    def level(self, tokens: Tensor, tree: Tree) -> Tensor:
        logits = super().level(tokens, tree)
        self.tokens.append(tokens)
        drafted, cache = torch.cat(self.tokens, dim=1), self.cache
        for row in range(self.sequences.batch):
            for column, path in enumerate(paths(tokens, tree, row)):
                self.cache, feature = copy.deepcopy(cache), self.predicted
                self.cache.rollback(self.kept)
                for steps, node in enumerate(path, start=1):
                    token = drafted[row, node].expand(len(drafted), 1)
                    feature = self.step(self.streams(token), feature)
                    self.cache.rollback([n + steps for n in self.kept])
                expected = self.logits(feature)[row, 0]
                torch.testing.assert_close(logits[row, column], expected, rtol=1e-4, atol=1e-4)
                WatchedEagle.compared += 1
        self.cache = cache
        return logits


def compare_levels(drafter: str, shape: str, family: str, guidance: float | None) -> None:
    options = {"guidance_scale": guidance, "do_sample": shape == "sampled"}
    kind: Any
    kind, recipe, need = (
        (WatchedEagle, "eagle2", "heads") if drafter == "eagle" else (WatchedModel, "sequoia", "draft_model")
    )
    kind.compared = 0
    parts = {need: drafter_parts(need, family)}
    generate(recipe, lambda: SHAPES[shape](kind, **parts), family, **options)
    assert kind.compared > 20


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("guidance", [None, 1.7], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("drafter", ["eagle", "draft_model"])
def test_the_logits_of_a_level_are_those_of_each_path_on_its_own(
    drafter: str, shape: str, guidance: float | None, family: str
) -> None:
    compare_levels(drafter, shape, family, guidance)


@pytest.mark.parametrize("drafter", ["eagle", "draft_model"])
def test_a_mask_under_which_siblings_see_each_other_would_be_noticed(
    drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RaggedCache.layout

    def causal(self: RaggedCache, new: int, tree: Tree | None, device: torch.device) -> Layout:
        at = original(self, new, tree, device)
        slots = at.base + (0 if tree is None else tree.size + 1 - new) + torch.arange(new)
        return replace(at, visible=torch.arange(self.longest + new) <= slots[..., None])

    monkeypatch.setattr(RaggedCache, "layout", causal)
    with pytest.raises(AssertionError, match="not close"):
        compare_levels(drafter, "likeliest", "llama", None)


def test_the_drafters_own_cache_forgets_the_tree() -> None:
    grown: list[int] = []

    class Noted(Eagle):
        def rollback(self) -> None:
            grown.extend(n - k for n, k in zip(self.cache.lengths, self.target.cache_lengths, strict=True))
            super().rollback()
            assert self.cache.lengths == self.target.cache_lengths

    heads = drafter_parts("heads", "llama")
    generate("eagle2", lambda: SHAPES["likeliest"](Noted, heads=heads))
    assert max(grown) == 2 * 3, "two levels of three nodes below the first"


# -- acceptance ------------------------------------------------------------------------------------------------------


def test_the_target_as_its_own_drafter_has_every_level_accepted() -> None:
    for recipe, options in (
        ("opt_tree", {}),
        ("sequoia", {}),
        ("sequoia", {"do_sample": True, "temperature": 0.8, "top_k": 20}),
        ("sequoia", {"do_sample": True, "guidance_scale": 1.5}),
        ("sequoia", {"do_sample": True, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2}),
    ):
        model = target("llama")
        fast = polyspec.custom_generate(recipe, seed=0, length=3, draft_model=model)
        settings = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None, "pad_token_id": 0, **options}
        model.generate(**prompts(), **settings, custom_generate=fast)
        assert fast.stats.acceptance_rate == 1, (recipe, options)
        assert fast.stats.tokens_per_call > 3, (recipe, options)


def test_siblings_make_a_tree_accept_more_than_the_chain_of_the_same_drafter() -> None:
    model, drafter = build("llama", scale=3.0), noisy_copy(build("llama", scale=3.0), 0.3)
    settings = {"do_sample": True, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    per_call = {}
    for recipe in ("speculative_sampling", "sequoia"):
        fast = polyspec.custom_generate(recipe, seed=0, length=3, draft_model=drafter)
        model.generate(torch.arange(2, 34)[:, None], **settings, custom_generate=fast)
        per_call[recipe] = fast.stats.tokens_per_call
    assert per_call["sequoia"] > per_call["speculative_sampling"] + 0.1


# -- shapes ----------------------------------------------------------------------------------------------------------


class Scripted:
    """Draws up the logits after a path from `rule(path)`, `[V]`."""

    hidden_layers: tuple[int, ...] = ()
    reach = 99
    vocabulary = None

    def __init__(self, rule: Callable[[tuple[int, ...]], Tensor]):
        self.rule, self.levels = rule, 0

    def begin(self, context: Context, hidden: Any) -> None:
        self.rows = context.sequences.batch

    def root(self) -> Tensor:
        self.drafted = torch.zeros(self.rows, 0, dtype=torch.long)
        return self.rule(()).expand(self.rows, 1, -1)

    def level(self, tokens: Tensor, tree: Tree) -> Tensor:
        self.levels += 1
        self.drafted = torch.cat([self.drafted, tokens], dim=1)
        return torch.stack(
            [
                torch.stack([self.rule(tuple(self.drafted[row, path].tolist())) for path in paths(tokens, tree, row)])
                for row in range(self.rows)
            ]
        )

    def rollback(self) -> None:
        pass


def propose(
    tree: Callable[..., LevelTree],
    rule: Callable[[tuple[int, ...]], Tensor],
    depth: int,
    draws: Any = None,
    rows: int = 1,
) -> tuple[Draft, Scripted]:
    """What `tree(inner)` proposes over the scripted drafter, to rows of two tokens."""
    vocab = len(rule(()))
    inner = Scripted(rule)
    drafter = tree(lambda: inner)
    sequences = Sequences(torch.ones(rows, 2, dtype=torch.long), 20)
    model: Any = SimpleNamespace(lockstep=False, vocab_size=vocab)
    drafter.begin(Context(model, sequences, Processing(), draws or Greedy(), Fixed(depth), DecodingStats()), None)
    return drafter.propose(depth), inner


def random_rule(vocab: int) -> Callable[[tuple[int, ...]], Tensor]:
    def rule(path: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((*path, len(path))) % 2**31)
        return 2 * torch.randn(vocab, generator=generator)

    return rule


def drafted_paths(draft: Draft, row: int = 0) -> list[tuple[int, ...]]:
    assert draft.tree is not None
    tree = Tree(draft.tree.parents.expand(len(draft.tokens), -1))
    return [tuple(draft.tokens[row, path].tolist()) for path in paths(draft.tokens, tree, row)]


@pytest.mark.parametrize("nodes", [1, 4, 9, 30])
def test_a_tree_as_wide_as_it_has_nodes_holds_the_likeliest_paths_there_are(nodes: int) -> None:
    vocab, depth, rule = 4, 3, random_rule(4)

    def chance(path: Sequence[int]) -> float:
        return float(sum(rule(tuple(path[:i])).log_softmax(-1)[token] for i, token in enumerate(path)))

    every = [p for d in range(1, depth + 1) for p in itertools.product(range(vocab), repeat=d)]
    best = sorted(every, key=chance, reverse=True)[:nodes]
    draft, _ = propose(lambda inner: LikeliestTree(inner, nodes, nodes), rule, depth)
    assert draft.probs is None
    assert sorted(drafted_paths(draft)) == sorted(best)
    assert draft.tree is not None and draft.tree.height >= max(map(len, best))


def test_a_narrow_tree_goes_on_from_its_likeliest_paths_only() -> None:
    draft, inner = propose(lambda inner: LikeliestTree(inner, 40, 2), random_rule(6), 4)
    found = drafted_paths(draft)
    assert len(found) == 2 + 3 * 2 * 2 and inner.levels == 3
    for depth in range(1, 4):
        parents = {p[:depth] for p in found if len(p) == depth + 1}
        assert len(parents) == 2 and parents <= set(found)


@pytest.mark.parametrize(
    ("sharpness", "threshold", "levels"), [(0.0, 0.2, 1), (0.0, None, 4), (30.0, 0.2, 4), (30.0, 1.5, 0)]
)
def test_another_level_is_drafted_while_it_promises_more_than_the_threshold(
    sharpness: float, threshold: float | None, levels: int
) -> None:
    """A flat drafter promises half a token with four nodes on the first level and nothing more on the second; a sure one
    promises one token a level."""
    rule = lambda path: torch.zeros(8).index_fill(0, torch.tensor([len(path)]), sharpness)  # noqa: E731
    draft, inner = propose(lambda inner: LikeliestTree(inner, 4, 4, threshold), rule, 5)
    assert inner.levels == levels
    assert draft.tree is not None and draft.tree.height == min(levels + 1, 4)


def test_a_sampled_tree_has_sequoias_shape_and_its_siblings_differ() -> None:
    rows, vocab, depth = 64, 6, 4
    draws = Independent(torch.Generator().manual_seed(0), torch.arange(rows))
    draft, inner = propose(lambda inner: SampledTree(inner, 12, RATES), random_rule(vocab), depth, draws, rows)
    shape = sequoia(RATES, 12, depth)
    assert draft.tree is not None and draft.probs is not None
    assert draft.tree.parents.tolist() == shape.parents.tolist() and inner.levels == shape.height - 1
    with_children = set(shape.parents.tolist())
    for row in range(rows):
        found = drafted_paths(draft, row)
        assert len(set(found)) == shape.size, "siblings differ, and so do paths"
        for node, path in enumerate([(), *found], start=-1):
            q = random_rule(vocab)(path).softmax(-1) if node in with_children else torch.zeros(vocab)
            torch.testing.assert_close(draft.probs[row, node + 1], q)


def test_first_children_are_drawn_from_q_and_second_ones_from_what_is_left() -> None:
    rows, q = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = Independent(torch.Generator().manual_seed(0), torch.arange(rows))
    first, second = draws.candidates(q.log().expand(rows, 1, 4), torch.zeros(rows, 1), 2)[:, 0].unbind(-1)
    pairs = torch.bincount(4 * first + second, minlength=16).view(4, 4) / rows
    expected = q[:, None] * q / (1 - q[:, None]) * (1 - torch.eye(4))
    torch.testing.assert_close(pairs, expected, rtol=0, atol=0.012)


def test_where_too_few_tokens_can_be_drawn_the_first_is_repeated() -> None:
    scores = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf], [-torch.inf] * 4])[:, None]
    draws = Independent(torch.Generator().manual_seed(0), torch.arange(2))
    few, none = draws.candidates(scores, torch.zeros(2, 1), 4)[:, 0].tolist()
    assert sorted(few[:2]) == [0, 2] and few[2:] == [few[0]] * 2
    assert none == [0] * 4


def test_no_more_children_than_there_are_tokens() -> None:
    rule = random_rule(3)
    assert len(set(drafted_paths(propose(lambda inner: LikeliestTree(inner, 9, 9), rule, 1)[0]))) == 3
    draft, _ = propose(lambda inner: SampledTree(inner, 9, [0.3] * 5), rule, 1)
    assert len(set(drafted_paths(draft))) == 3


@pytest.mark.parametrize(
    ("recipe", "knobs", "named"),
    [
        ("opt_tree", {"nodes": 0}, "nodes"),
        ("opt_tree", {"width": 1.5}, "width"),
        ("opt_tree", {"threshold": -1}, "threshold"),
        ("opt_tree", {"threshold": "low"}, "threshold"),
        ("sequoia", {"acceptance_by_rank": "high"}, "acceptance_by_rank"),
        ("sequoia", {"acceptance_by_rank": [0.5, "x"]}, "acceptance_by_rank"),
        ("sequoia", {"acceptance_by_rank": [1.5]}, "acceptance_by_rank"),
        ("sequoia", {"acceptance_by_rank": []}, "acceptance_by_rank"),
        ("sequoia", {"acceptance_by_rank": [0, 0]}, "acceptance_by_rank"),
    ],
)
def test_knobs_out_of_range_are_refused_by_name(recipe: str, knobs: dict[str, Any], named: str) -> None:
    with pytest.raises(polyspec.ConfigError, match=named):
        polyspec.custom_generate(recipe, draft_model=target("llama"), **knobs)
