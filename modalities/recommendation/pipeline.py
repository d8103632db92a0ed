"""Histories to lists of items, with a causal language model over item tokens."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from polyspec import pipelines
from polyspec.api import generator_of
from polyspec.decoding.beam import Beam, BeamContext
from polyspec.decoding.search import ByGumbel, ByProbability, Search, pack
from polyspec.distributions import row_seeds
from polyspec.errors import CheckpointError, ConfigError, InputError
from polyspec.metrics import DecodingStats
from polyspec.modalities.recommendation.items import Items, masks
from polyspec.modalities.recommendation.sample import existing_sample, with_titles
from polyspec.outputs import Result
from polyspec.target import make_target
from polyspec.verification import strict_topk

PLAIN, DEFAULT_RECIPE = "autoregressive", "atspeed_s"
DRAFT = "draft"  # a draft model's folder inside the target's
MOST_BEAMS = 1000


class Pipeline:
    """Recommends items to users by their histories. See `polyspec.pipeline` for the arguments.

    target: a folder with a model, its `items.safetensors` and perhaps a draft model in `draft/`, or (model, Items), or
    (model, Items, draft model or its folder); None: the sample.
    recipe: by default `atspeed_s` where the folder has a draft model or overrides name a drafter, else `autoregressive`,
    plain constrained beam search. dtype: by default float32, for in bfloat16 the order of items is decided by rounding where
    their scores are near. `items` may be replaced at any time; a call works with those it began with.
    """

    def __init__(
        self,
        *,
        target: Any = None,
        recipe: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        given = dict(overrides or {})
        is_sample = target is None
        target = existing_sample() if target is None else target
        folder = None if isinstance(target, tuple) else Path(target)
        if folder is not None:
            self.draft = str(folder / DRAFT) if (folder / DRAFT / "config.json").is_file() else None
        else:
            self.draft = target[2] if len(target) == 3 else None
        if self.draft is not None and recipe != PLAIN and "heads" not in given:
            given = {"draft_model": self.draft, **given}
        default = DEFAULT_RECIPE if {"draft_model", "heads"} & set(given) else PLAIN
        self.method = pipelines.choose("recommendation", recipe, default, given)
        if folder is None:
            model, items = target[:2] if len(target) in (2, 3) else (None, None)
            if not isinstance(model, PreTrainedModel) or not isinstance(items, Items):
                kinds = f"({', '.join(type(x).__name__ for x in target)})"
                raise ConfigError(f"target must be a folder or a (transformers model, Items) pair, got {kinds}")
            self.model: Any = model
        else:
            items = with_titles(Items.load(folder)) if is_sample else Items.load(folder)
            device = device or pipelines.default_device()
            loader = AutoModelForCausalLM.from_pretrained
            kind = pipelines.as_dtype(dtype or torch.float32, device)
            self.model = pipelines.load(loader, folder, dtype=kind).to(device).eval()
        self.items = items
        # the plain recipe names the loop of chains; lists are searched plainly by the beam loop
        self.loop = self.method.loop if isinstance(self.method.loop, Beam) else Beam(strict_topk, levels=0)
        checked = make_target(self.model)
        self.loop.check(checked, self.method.drafter())
        self.room = getattr(checked.config, "max_position_embeddings", None) or 1 << 30

    @property
    def items(self) -> Items:
        """The catalogue; assign another to change it while serving."""
        return self._catalogue[0]

    @items.setter
    def items(self, items: Items) -> None:
        vocab = self.model.get_input_embeddings().num_embeddings
        if items.highest_token >= vocab:
            raise CheckpointError(f"the items use token {items.highest_token}; the model knows 0 … {vocab - 1}")
        self._catalogue = items, items.trie.to(self.model.device)  # at once: a call may be under way

    @property
    def loaded(self) -> tuple[Any, Any, Any]:
        """What another pipeline takes as `target`, to share it."""
        return self.model, self.items, self.draft

    @torch.no_grad()
    def __call__(
        self,
        history: Sequence[int] | Sequence[Sequence[int]],
        *,
        k: int | Sequence[int] = 10,
        beams: int | Sequence[int] | None = None,
        allow: Collection[int] | Sequence[Collection[int] | None] | None = None,
        deny: Collection[int] | Sequence[Collection[int] | None] | None = None,
        seed: int | Sequence[int] | None = None,
        do_sample: bool | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Result:
        """The k best items for each history, `outputs` one list of Recommendation a history, best first.

        history: item ids, oldest first, or several such. k, beams: one for all or one a history; beams ≥ k is the width of
        the search, by default k. allow, deny: item ids to choose among or to leave out, for all, or one set (or None) a
        history. do_sample: draw k items without replacement from the model's distribution over allowed items, fixed by the
        seed, instead of the likeliest; an item's score is then its log-probability in that distribution, and the order that
        of the draws. progress: called with the number of levels. Where fewer than k items are allowed a list is shorter,
        and a warning says so. Raises InputError for empty or unknown histories, more items than there are, or filters that
        leave nothing, ConfigError for the rest.
        """
        (items, trie), device = self._catalogue, self.model.device
        histories = rows_of(history)
        wanted = per_row("k", k, len(histories))
        widths = wanted if beams is None else per_row("beams", beams, len(histories))
        for row, (count, width) in enumerate(zip(wanted, widths, strict=True)):
            if count > len(items):
                raise InputError(f"k = {count} is more than the {len(items)} items there are; ask for fewer")
            if width < count or width > max(MOST_BEAMS, count):
                raise ConfigError(f"beams must lie in [k, {MOST_BEAMS}], got {width} for k = {count} (row {row})")
        prompts = [items.prompt(h, self.room - trie.depth) for h in histories]
        filters = [
            items.allowed(a, d)
            for a, d in zip(each(allow, len(histories), "allow"), each(deny, len(histories), "deny"), strict=True)
        ]
        packed, lengths = pack(prompts, device)
        mask = masks(filters, len(items), device)
        seeds = row_seeds(seed, len(histories), device)
        search = Search(
            trie,
            packed,
            lengths,
            widths,
            ByGumbel(seeds) if do_sample else ByProbability(),
            None if mask is None else trie.alive(mask),
            generator_of(seeds),
        )
        stats = self.search(search)
        if progress is not None:
            progress(trie.depth)
        rows = zip(search.found.node.tolist(), search.found.score.tolist(), filters, wanted, strict=True)
        outputs = [items.recommendations(nodes, scores, f, count) for nodes, scores, f, count in rows]
        self.say_if_short(outputs, wanted, filters)
        return Result(outputs, stats)

    def search(self, search: Search) -> DecodingStats:
        """Run the recipe's loop."""
        stats = DecodingStats(recipe=self.method.recipe.name, guarantee=self.method.recipe.guarantee)
        start = time.perf_counter()
        self.loop.run(BeamContext(make_target(self.model), search, stats), self.method.drafter())
        stats.wall_seconds = time.perf_counter() - start
        return stats

    @staticmethod
    def say_if_short(outputs: list[list[Any]], wanted: list[int], filters: list[np.ndarray | None]) -> None:
        for row, (found, count, mask) in enumerate(zip(outputs, wanted, filters, strict=True)):
            if len(found) < count and mask is not None:
                left = int(mask.sum())
                warnings.warn(f"row {row}: {count} items asked for, allow and deny leave {left}", stacklevel=3)


def rows_of(history: Any) -> list[list[int]]:
    """One history or several, as a list of several; InputError if there is none."""
    if isinstance(history, str | bytes) or not hasattr(history, "__iter__"):
        raise InputError(f"a history is a list of item ids; got {history!r}")
    rows = list(history)
    nested = [hasattr(row, "__iter__") and not isinstance(row, str | bytes) for row in rows]
    if rows and all(nested):
        return [list(row) for row in rows]
    if any(nested):
        raise InputError("give one history, a list of item ids, or a list of such; not both in one")
    return [rows]


def per_row(name: str, value: Any, rows: int) -> list[int]:
    """A whole number ≥ 1 for every row, from one or a list of them."""
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value] * rows
    if len(values) != rows:
        raise ConfigError(f"{name} has {len(values)} entries for {rows} histories; give one a history or one for all")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int | np.integer) or v < 1:
            raise ConfigError(f"{name} must be a whole number ≥ 1, got {v!r}")
    return [int(v) for v in values]


def each(items: Any, rows: int, name: str) -> list[Any]:
    """A set of item ids, or None, for every row, from one for all or one a row."""
    if items is None:
        return [None] * rows
    if isinstance(items, str | bytes) or not hasattr(items, "__iter__"):
        raise InputError(f"{name} must hold item ids; got {items!r}")
    items = list(items)
    if any(x is None or hasattr(x, "__iter__") for x in items):
        if len(items) != rows:
            raise InputError(f"{name} has {len(items)} sets for {rows} histories; give one a history or one for all")
        return items
    return [items] * rows
