"""What drafts a chain, or a block for a tree, is told from what was handed over: a model, heads, or the folder of either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import target

import polyspec
from polyspec.drafting.block_heads import block_heads
from polyspec.drafting.chain_drafter import chain_drafter
from polyspec.drafting.dflash import DFlash, DFlashModel
from polyspec.drafting.draft_model import DraftModel
from polyspec.drafting.eagle import Eagle, EagleModel
from polyspec.drafting.medusa import Medusa, MedusaModel
from polyspec.pipelines import shipped_drafter
from polyspec.recipe import find_recipe


@pytest.mark.parametrize(("kind", "drafter"), [(DFlashModel, DFlash), (EagleModel, Eagle), (None, DraftModel)])
def test_models_and_folders_find_their_drafter(kind: Any, drafter: type, tmp_path: Path) -> None:
    model = target("llama") if kind is None else kind.for_target(target("llama"))
    model.save_pretrained(tmp_path)
    assert type(chain_drafter(model)) is drafter
    assert type(chain_drafter(tmp_path)) is drafter


def test_other_heads_are_refused(tmp_path: Path) -> None:
    MedusaModel.for_target(target("llama")).save_pretrained(tmp_path)
    with pytest.raises(polyspec.ConfigError, match="not by 'polyspec_medusa' heads"):
        polyspec.custom_generate("speculative_sampling", draft_model=tmp_path)


@pytest.mark.parametrize(("kind", "drafter"), [(DFlashModel, DFlash), (MedusaModel, Medusa)])
def test_a_tree_of_blocks_takes_either_kind_of_heads(kind: Any, drafter: type, tmp_path: Path) -> None:
    heads = kind.for_target(target("llama"))
    heads.save_pretrained(tmp_path)
    assert type(block_heads(heads)) is type(block_heads(tmp_path)) is drafter
    with pytest.raises(polyspec.ConfigError, match="not by 'polyspec_eagle' heads"):
        block_heads(EagleModel.for_target(target("llama")))


def test_samples_without_a_draft_model_take_their_block_drafter() -> None:
    folders = {
        name: shipped_drafter(name, find_recipe("gumbel_coupled"), "draft_model") for name in ("janus-emoji", "none")
    }
    assert folders["janus-emoji"] is not None and folders["janus-emoji"].name == "dflash" and folders["none"] is None
    smollm = shipped_drafter("smollm2-135m-instruct", find_recipe("gumbel_coupled"), "draft_model")
    assert smollm is not None and smollm.name == "draft_model"
    assert shipped_drafter("janus-emoji", find_recipe("sequoia"), "draft_model") is None, "trees need a model"
