"""Draft heads: greedy identity whatever the heads, and heads that know their own target or say that they do not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, build, target
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import polyspec
from polyspec.cache import RaggedCache
from polyspec.drafting import heads as heads_module
from polyspec.drafting.dflash import DFlash, DFlashModel, spread_layers
from polyspec.drafting.eagle import Eagle, EagleModel
from polyspec.drafting.heads import HeadModel, TokenLayers
from polyspec.drafting.level_tree import LikeliestTree
from polyspec.drafting.medusa import MedusaModel
from polyspec.lengths import Fixed
from polyspec.target import make_target
from polyspec.trees import Tree

HEADS: dict[str, tuple[type[HeadModel], dict[str, Any]]] = {
    "dflash": (DFlashModel, {"layers": 2, "block": 5, "bridge": True}),
    "ddtree": (DFlashModel, {"block": 5, "bridge": True, "recurrent": 16}),
    "eagle": (EagleModel, {}),
    "eagle2": (EagleModel, {}),
    "medusa": (MedusaModel, {"heads": 4}),
}
NEW_TOKENS = 24


def prompts(batch: int) -> dict[str, Tensor]:
    """Prompts of 9, 6, 9 and 1 tokens, padded on the left; for a batch of one, the first."""
    ids = torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :8] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0)[:batch], "attention_mask": mask[:batch]}


def untrained(recipe: str, family: str = "llama", **sizes: Any) -> HeadModel:
    kind, usual = HEADS[recipe]
    return kind.for_target(target(family), **{**usual, **sizes})


@cache
def plain(family: str, batch: int, guidance: float | None, new: int = NEW_TOKENS) -> Tensor:
    return target(family).generate(
        **prompts(batch), do_sample=False, max_new_tokens=new, guidance_scale=guidance, pad_token_id=0
    )


def identical(recipe: str, heads: Any, family: str = "llama", batch: int = 4, guidance: float | None = None) -> Any:
    fast = polyspec.custom_generate(recipe, heads=heads, length=4)
    out = target(family).generate(
        **prompts(batch),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        guidance_scale=guidance,
        pad_token_id=0,
        custom_generate=fast,
    )
    assert torch.equal(out, plain(family, batch, guidance))
    return fast.stats


@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.parametrize("guidance", [None, 1.7], ids=["plain", "guided"])
@pytest.mark.parametrize("batch", [1, 4])
def test_untrained_heads_do_not_change_greedy_output(recipe: str, batch: int, guidance: float | None) -> None:
    assert identical(recipe, untrained(recipe), batch=batch, guidance=guidance).draft_calls > 0


@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_heads_work_on_other_architectures(recipe: str, family: str) -> None:
    identical(recipe, untrained(recipe, family), family)


@pytest.mark.parametrize("recipe", HEADS)
def test_a_trimmed_vocabulary_drafts_only_its_tokens_and_keeps_the_output(recipe: str) -> None:
    few = torch.arange(1, VOCAB, 3)
    heads = untrained(recipe, vocabulary=few)
    identical(recipe, heads)
    layers = TokenLayers(make_target(target("llama")), heads.vocab_map)
    hidden = torch.randn(2, 3, 32)
    logits = layers.spread(layers.logits(hidden))
    full = target("llama").get_output_embeddings()(hidden)
    torch.testing.assert_close(logits[..., few], full[..., few])
    assert logits.isfinite().sum() == 2 * 3 * len(few)
    assert layers.own_ids(few).tolist() == list(range(len(few)))
    assert layers.own_ids(torch.tensor([0])).tolist() == [-100]


class Only(LogitsProcessor):
    """Leaves one token, by turns one that the head predicts and one that it does not."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        others = torch.arange(scores.shape[1]) != 3 + input_ids.shape[1] % 2
        return scores.masked_fill(others, -torch.inf)


@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_where_no_token_of_a_trimmed_vocabulary_may_stand_nothing_of_it_is_kept(recipe: str, do_sample: bool) -> None:
    heads = untrained(recipe, vocabulary=torch.arange(1, VOCAB, 2))
    out = target("llama").generate(
        **prompts(4),
        do_sample=do_sample,
        max_new_tokens=8,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Only()]),
        custom_generate=polyspec.custom_generate(recipe, heads=heads, length=3),
    )
    assert (out[:, 9:] == 3 + torch.arange(9, 17) % 2).all()


def test_a_block_drafter_may_be_narrower_than_its_target() -> None:
    identical("dflash", untrained("dflash", hidden_size=16, num_attention_heads=2))


@pytest.mark.parametrize("recipe", HEADS)
def test_heads_survive_saving(recipe: str, tmp_path: Path) -> None:
    heads = untrained(recipe, vocabulary=torch.arange(1, VOCAB, 2))
    heads.save_pretrained(tmp_path)
    loaded = type(heads).from_pretrained(tmp_path)
    for (name, old), (_, new) in zip(heads.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(old, new), name
    assert identical(recipe, str(tmp_path)).to_dict()["accepted_tokens"] == identical(recipe, heads).accepted_tokens


@pytest.mark.parametrize("recipe", HEADS)
def test_the_same_seed_makes_the_same_heads(recipe: str) -> None:
    one, same, other = (untrained(recipe, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert recipe == "medusa" or any(not torch.equal(one[k], other[k]) for k in one)


def test_what_a_block_drafter_keeps_is_what_it_would_compute_from_scratch() -> None:
    """Accepted tokens enter the drafter's cache round by round; the result must not depend on the rounds."""
    model, tgt = untrained("dflash", layers=2), make_target(target("llama"))
    assert isinstance(model, DFlashModel)
    hidden = tuple(torch.randn(2, 9, 32) for _ in model.config.target_layers or ())
    whole, parts = RaggedCache(2, 32), RaggedCache(2, 32)
    for kept_here, cuts in ((whole, [[9, 6]]), (parts, [[4, 3], [5, 3], [9, 6]])):
        for kept in cuts:
            start = torch.tensor(kept_here.lengths)[:, None]
            columns = (start + torch.arange(9)).clamp(max=8)
            fed = tuple(h.gather(1, columns[..., None].expand(-1, -1, 32)) for h in hidden)
            for layer, (k, v) in enumerate(model.keys_values(model.context(fed), start + torch.arange(9))):
                kept_here.update(k, v, layer)
            kept_here.rollback(kept)
    drafts = []
    for kept_here in (whole, parts):
        drafter = DFlash(model)
        drafter.target, drafter.cache = tgt, kept_here
        block = model.queries(torch.ones(2, 32), torch.ones(2, 32))
        positions = drafter.positions(block.shape[1])
        mask = (torch.arange(kept_here.longest + block.shape[1]) <= positions[:, -1:])[:, None, None, :]
        drafts.append(model(block, positions, mask, kept_here.update))
    torch.testing.assert_close(*drafts)


@pytest.mark.parametrize("guidance", [None, 1.7], ids=["plain", "guided"])
@pytest.mark.parametrize("state", [8, 24], ids=["one matrix", "two matrices"])
@pytest.mark.parametrize("trimmed", [False, True], ids=["all tokens", "few"])
def test_a_tree_drafted_in_turn_predicts_at_every_node_what_its_path_alone_would(
    guidance: float | None, state: int, trimmed: bool
) -> None:
    """The states of a level are its parents' carried on: against `along` over each node's whole path."""
    model = untrained("ddtree", recurrent=state, vocabulary=torch.arange(1, VOCAB, 2) if trimmed else None)
    assert isinstance(model, DFlashModel) and model.recurrence is not None
    torch.nn.init.normal_(model.recurrence.out.weight)
    depths: list[int] = []

    class Compared(DFlash):
        def root(self) -> Tensor:
            self.drafted = self.sequences.tail(1)[:, :0]
            return super().root()

        def level(self, tokens: Tensor, tree: Tree) -> Tensor:
            logits, first = super().level(tokens, tree), self.drafted.shape[1]
            self.drafted = torch.cat([self.drafted, tokens], dim=1)
            for row in range(len(tokens)):
                streams = [row] if guidance is None else [row, row + len(tokens)]
                for node in range(first, self.drafted.shape[1]):
                    path, above = [], node
                    while above >= 0:
                        path.append(int(self.drafted[row, above]))
                        above = int(tree.parents[row, above])
                    path = [int(self.sequences.tail(1)[row, 0]), *reversed(path)]
                    embedded = self.layers.embed(torch.tensor([path])).expand(len(streams), -1, -1)
                    alone = model.along(self.prepared[streams, : len(path)], embedded)[:, -1:]
                    torch.testing.assert_close(logits[row, node - first], self.logits(alone)[0, 0], rtol=1e-4, atol=1e-4)
                    depths.append(len(path))
            return logits

    fast = polyspec.custom_generate("ddtree", heads=model, length=4)
    fast.method = replace(fast.method, drafter=lambda: LikeliestTree(lambda: Compared(model), nodes=6, width=6))
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "guidance_scale": guidance}
    target("llama").generate(**prompts(4), **settings, custom_generate=fast)
    assert set(depths) == {2, 3, 4}


def test_hidden_states_are_spread_from_the_second_layer_to_the_third_last() -> None:
    assert spread_layers(30, 5) == [2, 8, 15, 22, 28]
    assert spread_layers(30, 1) == [28]
    assert spread_layers(2, 5) == [2]
    with pytest.raises(polyspec.ConfigError):
        spread_layers(30, 0)


def test_a_block_drafter_with_a_bridge_begins_with_what_the_target_predicted_last() -> None:
    """Hidden states fused last and handed on by the bridge: the outputs point where the target's last hidden state does."""
    model = DFlashModel.for_target(target("llama"), bridge=True)
    assert model.config.target_layers is not None and model.config.target_layers[-1] == 2
    hidden = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    others = (torch.randn(4, 6, 32),) * (len(model.config.target_layers) - 1)
    last = model.context((*others, hidden))[:, -1]
    queries = model.queries(torch.randn(4, 32), last)
    alike = torch.nn.functional.cosine_similarity(queries[:, 1:], hidden[:, -1:], dim=-1)
    assert (alike > 0.9).all()


@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.parametrize(
    ("other", "named"),
    [({"hidden": 48}, "width 48.*width 32"), ({"layers": 4}, "4 layers.*2 layers"), ({"vocab": 70}, "70 tokens.*61 tokens")],
)
def test_heads_of_another_target_are_refused_by_name(recipe: str, other: dict[str, int], named: str) -> None:
    kind, sizes = HEADS[recipe]
    heads = kind.for_target(build("llama", **other), **sizes)
    with pytest.raises(polyspec.CheckpointError, match=named):
        identical(recipe, heads)


@pytest.mark.parametrize("recipe", HEADS)
def test_a_folder_that_is_missing_or_damaged_is_a_checkpoint_error(recipe: str, tmp_path: Path) -> None:
    def load(heads: Any) -> None:
        target("llama").generate(
            **prompts(1), max_new_tokens=4, custom_generate=polyspec.custom_generate(recipe, heads=heads)
        )

    with pytest.raises(polyspec.CheckpointError):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(polyspec.ConfigError, match="heads must be"):
        load(7)
    untrained(recipe).save_pretrained(tmp_path / "whole")
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(polyspec.CheckpointError):
        load(tmp_path / "cut")
    other = "medusa" if recipe != "medusa" else "eagle"
    untrained(other).save_pretrained(tmp_path / "other")
    with pytest.raises(
        polyspec.CheckpointError, match=rf"polyspec_{other}.*{HEADS[recipe][0].config_class.model_type}"
    ):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (DFlashModel, {"block": 1}),
        (DFlashModel, {"recurrent": -1}),
        (DFlashModel, {"target_layers": [99]}),
        (DFlashModel, {"target_layers": 0}),
        (DFlashModel, {"num_attention_heads": 5}),
        (EagleModel, {"hidden_size": 16}),
        (EagleModel, {"target_layers": []}),
        (MedusaModel, {"heads": 0}),
    ],
)
def test_sizes_out_of_range_are_refused(kind: type[HeadModel], sizes: dict[str, Any]) -> None:
    with pytest.raises(polyspec.ConfigError):
        kind.for_target(target("llama"), **sizes)


def test_eagle_predicts_from_true_features_after_every_round() -> None:
    """Its cache, caught up round by round, gives the prediction of one pass over all true features."""
    model = untrained("eagle")
    assert isinstance(model, EagleModel)
    tgt = make_target(target("llama"))
    drafter = Eagle(model)
    drafter.target, drafter.layers = tgt, TokenLayers(tgt, None)
    tokens, hidden = torch.randint(2, VOCAB, (2, 8)), (torch.randn(2, 8, 32),)
    predictions = []
    for cuts in ([[8, 6]], [[3, 2], [5, 4], [8, 6]]):
        drafter.cache = RaggedCache(2, 16)
        for kept in cuts:
            columns = (torch.tensor(drafter.cache.lengths)[:, None] + torch.arange(8)).clamp(max=7)
            fed = (hidden[0].gather(1, columns[..., None].expand(-1, -1, 32)),)
            drafter.extend(tokens.gather(1, columns), fed, kept)
        predictions.append(drafter.predicted)
    torch.testing.assert_close(*predictions)


class NowAndThen(Fixed):
    """Drafts in some rounds only."""

    def begin(self, context: Any) -> None:
        self.rounds = iter([0, 0, 2, 0, 0, 3, 0, 0, 0, 2, 2, 0, 1] * 10)

    def next(self) -> int:
        return next(self.rounds)


@pytest.mark.parametrize("guidance", [None, 1.7], ids=["plain", "guided"])
@pytest.mark.parametrize(("drafter", "recipe"), [(Eagle, "eagle"), (DFlash, "dflash")])
def test_what_waits_while_nothing_is_drafted_is_taken_in_before_a_draft(
    drafter: Any, recipe: str, guidance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drafts(most: int) -> list[Tensor]:
        monkeypatch.setattr(heads_module, "MOST_WAITING", most)
        found: list[Tensor] = []

        class Noted(drafter):
            def propose(self, count: int) -> Any:
                draft = super().propose(count)
                found.append(draft.tokens[self.sequences.running_tensor])  # of rows that have stopped they are arbitrary
                return draft

        fast = polyspec.custom_generate(recipe, heads=heads)
        fast.method = replace(fast.method, drafter=lambda: Noted(heads), length=NowAndThen(1))
        # rows stop at lengths of their own
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": [5, 9], "pad_token_id": 0}
        target("llama").generate(**prompts(4), **settings, guidance_scale=guidance, custom_generate=fast)
        return found

    heads = untrained(recipe)
    waiting, at_once = drafts(64), drafts(1)
    assert len(waiting) == len(at_once) > 4
    for ours, theirs in zip(waiting, at_once, strict=True):
        assert torch.equal(ours, theirs)
