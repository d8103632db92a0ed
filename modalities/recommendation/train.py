"""`polyspec task=train modality=recommendation`: a generative recommender of your own, and a draft model for it.

From histories to a folder that `polyspec.pipeline("recommendation", target=folder)` loads: semantic IDs
(`items.safetensors`), a Llama over item tokens, and in `draft/` a smaller one trained with one of AtSpeed's losses. Every
stage continues where an interrupted run stopped. Then the recommender is measured on the test users beside popularity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from polyspec.errors import ConfigError
from polyspec.lengths import positive
from polyspec.modalities.recommendation import evaluate
from polyspec.modalities.recommendation.data import Example, Interactions, movielens, parquet_splits
from polyspec.modalities.recommendation.items import FILE, Items
from polyspec.modalities.recommendation.pipeline import DRAFT, PLAIN, Pipeline
from polyspec.modalities.recommendation.semantic_ids import ResidualQuantiser, as_tokens, with_digit
from polyspec.pipelines import as_dtype
from polyspec.training import make_folder
from polyspec.training.trainer import fit

BEGIN, FIRST = 1, 2  # token ids: the start of every prompt, and the first that an item may use


@dataclass(frozen=True, slots=True)
class ItemsConfig:
    """levels of codes codes each, from dimensions-wide embeddings, before the last digit; the latest max_history items of
    a history are used. titles: whether the data's titles are stored with the items."""

    levels: int = 3
    codes: int = 64
    dimensions: int = 32
    max_history: int = 50
    seed: int = 0
    titles: bool = True

    def __post_init__(self) -> None:
        for name in ("levels", "codes", "dimensions", "max_history"):
            positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama's shape. dropout: of attention; item_dropout: the share of a history's items left out in training."""

    hidden_size: int
    layers: int
    heads: int = 4
    dropout: float = 0.0
    item_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads"):
            positive(name, getattr(self, name))
        if not (0 <= self.dropout < 1 and 0 <= self.item_dropout < 1):
            raise ConfigError(
                f"dropout and item_dropout must lie in [0, 1), got {self.dropout} and {self.item_dropout}"
            )

    def build(self, vocab_size: int, context: int, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=self.hidden_size,
                intermediate_size=8 * self.hidden_size // 3,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=context,
                attention_dropout=self.dropout,
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=BEGIN,
                eos_token_id=None,
            )
        )


def train(config: Mapping[str, Any]) -> Path:
    """Train what `config`, a composed `train` group, describes; returns the folder of the result.

    Keys: data (a Interactions to instantiate), output, device, dtype (of the arithmetic), items, model, schedule, draft
    (model, schedule, objective, or None: no draft model), measure (how to measure, or None). Raises ConfigError, InputError
    or CheckpointError before anything long starts.
    """
    from hydra.utils import instantiate

    settings: dict[str, Any] = dict(instantiate(config, _convert_="object"))
    output, device = Path(settings.get("output") or f"outputs/{settings['name']}"), settings.get("device") or "cpu"
    dtype = as_dtype(settings.get("dtype"), device)
    make_folder(output)
    found: Interactions = settings["data"]()
    shape, model_shape, schedule = settings["items"], settings["model"], settings["schedule"]
    items = Items.load(output) if (output / FILE).is_file() else make_items(found, shape)
    items.save(output)
    context = len(items.prefix) + (shape.max_history + 1) * items.tokens.shape[1]
    model = model_shape.build(items.highest_token + 1, context, schedule.seed)
    windows = partial(Windows, items, found.train, shape.max_history)
    fit(
        model,
        lambda _: next_token_loss,
        windows(model_shape.item_dropout),
        collate,
        schedule,
        output,
        device=device,
        dtype=dtype,
        stored=torch.float32,
    )
    model.to(device).requires_grad_(False)
    if settings.get("draft"):
        draft = settings["draft"]
        small = draft["model"].build(items.highest_token + 1, context, schedule.seed)
        fit(
            small,
            lambda _: partial(draft["objective"], target=model),
            windows(0.0),
            collate,
            draft["schedule"],
            output / DRAFT,
            device=device,
            dtype=dtype,
            stored=torch.float32,
        )
    if settings.get("measure"):
        figures = settings["measure"](model.eval(), items, found)
        (output / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")
        for name, figure in figures.items():
            print(f"{name}: {figure:.4f}")
    return output


# -- items ---------------------------------------------------------------------------------------------------------------


def make_items(found: Interactions, shape: ItemsConfig) -> Items:
    """The catalogue: semantic IDs that came with the data, else made from who was chosen with whom."""
    ids = found.items
    if found.semantic_ids:
        codes = np.array([found.semantic_ids[i] for i in ids])
    else:
        embeddings = embed_items(found.train, ids, shape.dimensions)
        quantiser = ResidualQuantiser.fit(embeddings, shape.levels, shape.codes, seed=shape.seed)
        codes = with_digit(quantiser.encode(embeddings).numpy())
    sizes = (codes.max(0) + 1).tolist()
    titles = [found.titles.get(i, "") for i in ids] if found.titles and shape.titles else None
    return Items(ids, as_tokens(codes, sizes, FIRST), titles, prefix=[BEGIN], max_history=shape.max_history)


def embed_items(histories: Sequence[Sequence[int]], ids: Sequence[int], dimensions: int, window: int = 5) -> Tensor:
    """Embeddings `[I, dimensions]`: the shifted positive pointwise mutual information of items at most `window` apart in
    a history, factorised, as word2vec does implicitly (Levy & Goldberg 2014). Items that never occur get zeros."""
    index = {item: i for i, item in enumerate(ids)}
    counts = torch.zeros(len(ids), len(ids))
    for history in histories:
        row = torch.tensor([index[i] for i in history if i in index])
        for gap in range(1, min(window, len(row) - 1) + 1):
            counts.index_put_((row[:-gap], row[gap:]), torch.tensor(1.0 / gap), accumulate=True)
    counts = counts + counts.T
    total, marginal = counts.sum(), counts.sum(1)
    expected = marginal[:, None] * marginal / total.clamp(min=1)
    information = torch.where(counts > 0, (counts / expected.clamp(min=1e-9)).log(), torch.tensor(0.0)).clamp(min=0)
    u, s, _ = torch.svd_lowrank(information, q=min(dimensions, len(ids)), niter=6)
    return u * s.sqrt()


# -- target --------------------------------------------------------------------------------------------------------------


class Windows(Dataset[dict[str, Any]]):
    """Stretches of at most max_history + 1 items of users' histories, each anew at random, as tokens. A user with a long
    history has as many entries as stretches without overlap would be."""

    def __init__(self, items: Items, histories: Sequence[Sequence[int]], max_history: int, item_dropout: float):
        self.items, self.longest, self.item_dropout = items, max_history + 1, item_dropout
        self.histories = [np.array([items.index[i] for i in h if i in items.index]) for h in histories]
        self.histories = [h for h in self.histories if len(h) > 1]
        self.rows = [n for n, h in enumerate(self.histories) for _ in range(-(-len(h) // self.longest))]
        self.lengths = [min(len(self.histories[n]), self.longest) for n in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        history = self.histories[self.rows[row]]
        start = int(torch.randint(max(len(history) - self.longest, 0) + 1, ()))
        chosen = history[start : start + self.longest]
        if self.item_dropout:
            keep = torch.rand(len(chosen)).numpy() >= self.item_dropout
            chosen = chosen[keep] if keep.sum() > 1 else chosen
        return {"tokens": torch.tensor([*self.items.prefix, *self.items.tokens[chosen].ravel().tolist()])}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`tokens [B, T]` padded on the right with 0, `lengths [B]`."""
    tokens = [r["tokens"] for r in rows]
    padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return {"tokens": padded, "lengths": torch.tensor([len(t) for t in tokens])}


def next_token_loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Cross-entropy of every token of every item but the first."""
    tokens = batch["tokens"]
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels(batch).flatten(), ignore_index=-100)
    return {"loss": loss}


def labels(batch: dict[str, Any]) -> Tensor:
    """What follows each of the tokens but the last, `[B, T-1]`; -100 behind a row's end."""
    tokens = batch["tokens"][:, 1:]
    column = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill(column >= batch["lengths"][:, None] - 1, -100)


# -- draft model ---------------------------------------------------------------------------------------------------------


class AtSpeedObjective:
    """AtSpeed's losses (2410.05165, §3.2-3.3) for a draft model q of a recommender p, on items' tokens.

    strict: KL(q ‖ p) over the draft's K likeliest tokens, and p_(K) · H(q), p_(K) the target's K-th highest probability:
    the draft's best should be among the target's best K, and spread no more than it must. relaxed: total variation, what
    decides how many draws are kept. Either is mixed with cross-entropy on the histories, of weight 1 - alpha.
    """

    def __init__(self, kind: str = "strict", k: int = 20, alpha: float = 0.7):
        if kind not in ("strict", "relaxed"):
            raise ConfigError(f"the draft's objective must be strict or relaxed, got {kind!r}")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must lie in [0, 1], got {alpha!r}")
        self.kind, self.k, self.alpha = kind, positive("k", k), alpha

    def __call__(self, model: Any, batch: dict[str, Any], *, target: PreTrainedModel) -> dict[str, Tensor]:
        tokens = batch["tokens"][:, :-1]
        with torch.no_grad():
            log_p = target(input_ids=tokens).logits.float().log_softmax(-1)
        log_q = model(input_ids=tokens).logits.float().log_softmax(-1)
        wanted = labels(batch)
        real = wanted != -100
        ce = functional.nll_loss(log_q.flatten(0, 1), wanted.flatten(), ignore_index=-100)
        loss = ((self.strict if self.kind == "strict" else self.relaxed)(log_q, log_p) * real).sum() / real.sum()
        overlap = (torch.minimum(log_q.detach().exp(), log_p.exp()).sum(-1) * real).sum() / real.sum()
        return {"loss": self.alpha * loss + (1 - self.alpha) * ce, "ce": ce, "overlap": overlap}

    def strict(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        q, k = log_q.exp(), min(self.k, log_q.shape[-1])
        top = log_q.topk(k).indices
        divergence = (q * (log_q - log_p)).gather(-1, top).sum(-1)
        lowest = log_p.topk(k).values[..., -1].exp()
        return divergence - lowest * (q * log_q).sum(-1)

    def relaxed(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)


# -- quality -------------------------------------------------------------------------------------------------------------


def measure(
    model: Any,
    items: Items,
    found: Interactions,
    *,
    k: int = 10,
    beams: int = 50,
    users: int | None = None,
    batch: int = 32,
) -> dict[str, float]:
    """Recall@k and NDCG@k on the test users, of the recommender and of popularity; what a user has seen is not offered
    again, to either."""
    chosen = found.test[:users]
    targets = [e.targets for e in chosen]
    pipe = Pipeline(target=(model, items), recipe=PLAIN)
    rest = evaluate.popularity(found.train, k, [e.history for e in chosen])
    lists: list[list[int]] = []
    for first in tqdm(range(0, len(chosen), batch), desc="measuring", unit=" batches"):
        rows: Sequence[Example] = chosen[first : first + batch]
        found_rows = pipe(
            [e.history for e in rows], k=k, beams=max(k, beams), deny=[set(e.history) for e in rows]
        ).outputs
        lists += [[r.item_id for r in row] for row in found_rows]
    scores: dict[str, Callable[..., float]] = {"recall": evaluate.recall, "ndcg": evaluate.ndcg}
    return {
        f"{name}@{k}{label}": score(ranked, targets, k)
        for label, ranked in (("", lists), (", popularity", rest))
        for name, score in scores.items()
    }


def interactions(name: str = "movielens", path: str | None = None) -> Interactions:
    """`movielens`, or splits in the folder `path`; ConfigError for neither."""
    if name not in ("movielens", "parquet") or (name == "parquet") != (path is not None):
        raise ConfigError("train.data.name must be movielens, or parquet with train.data.path=<folder of splits>")
    return parquet_splits(path) if path is not None else movielens()
