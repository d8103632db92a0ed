"""Training draft heads and draft models on what a target generates itself.

`train` is the whole way, from a `train` configuration (conf/train/): the target continues prompts (data), its hidden
states are computed once (features), the head learns from both (trainer, objectives). Every stage continues where an
interrupted run stopped. What differs between modalities, how a target draws its own data, is the class `DataSource` in the
module `own_data` of its package, which may have a method `inputs` (see `generate_corpus`); for other targets call the
stages with a Target and a Corpus of your own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from polyspec.errors import CheckpointError, InputError
from polyspec.pipelines import part_of
from polyspec.training.data import Corpus, corpus_of, generate_corpus, grow_corpus, joined, load_corpus
from polyspec.training.features import FEATURES, Features, JoinedFeatures, compute_features, stored_features
from polyspec.training.trainer import Schedule, train_head

__all__ = [
    "Corpus",
    "Features",
    "Schedule",
    "compute_features",
    "corpus_of",
    "generate_corpus",
    "grow_corpus",
    "load_corpus",
    "read_prompts",
    "train",
    "train_head",
]


def train(config: Mapping[str, Any]) -> Path:
    """Train what `config`, a composed `train` group, describes; returns the folder of the result.

    Keys: modality, target (folder, hub id, None: the modality's sample), output, device, dtype, prompts (None: the
    modality's own), data (what its `own_data` takes, `folder`, and `also`: data folders of earlier trainings for the same
    target, or another with the same layers, to learn from as well), vocabulary (size of the trimmed one, None: all
    tokens), start (folder of trained heads of the same sizes to go on from, or None), head, objective, schedule (things to
    instantiate). Raises ConfigError, InputError or CheckpointError before anything long starts.
    """
    from hydra.utils import instantiate
    from omegaconf import DictConfig, OmegaConf

    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    assert isinstance(plain, Mapping)
    settings: dict[str, Any] = {str(k): v for k, v in plain.items()}
    source_class = part_of(settings.get("modality") or "text", "own_data").DataSource
    output = Path(settings.get("output") or f"outputs/{settings['name']}")
    schedule, objective = instantiate(settings["schedule"]), instantiate(settings["objective"])
    source = source_class(settings)
    target, tokenizer = source.target, source.tokenizer
    make_folder(output)

    data = dict(settings["data"])
    folder, also = Path(data.pop("folder", None) or output / "data"), data.pop("also", None) or []
    others = [load_corpus(place) for place in also]
    corpus = source.corpus(folder, **data)
    size = settings.get("vocabulary") or target.vocab_size
    trimmed = size < target.vocab_size
    vocabulary = joined([corpus, *others]).frequent(size, target.vocab_size) if trimmed else None
    head = instantiate(settings["head"])(target, vocabulary=vocabulary)
    if start := settings.get("start"):  # trained weights, with the vocabulary they predict
        begin_from(start, head)

    depth = target.config.num_hidden_layers
    read = list(getattr(head.config, "target_layers", None) or ())
    layers = [*read, depth] if objective.last_hidden else read
    width = target.config.hidden_size
    parts = [stored_features(place, c, layers, width) for place, c in zip(also, others, strict=True)]
    features = compute_features(
        target,
        corpus,
        layers,
        folder / FEATURES,
        batch=settings.get("feature_batch", 8),
        inputs=getattr(source, "inputs", None),
    )
    target.hidden_layers = ()
    whole = JoinedFeatures([features, *parts])
    train_head(head, target, whole.corpus, whole, objective, schedule, output)
    if not read and tokenizer is not None:  # a model of its own, to be loaded as any other
        tokenizer.save_pretrained(output)
    return output


def read_prompts(source: str | Sequence[str]) -> list[str]:
    """Prompts from a list, a file (one a line; .jsonl: objects with a "prompt"), or a name in samples/prompts/."""
    if not isinstance(source, str):
        return list(source)
    path = Path(source)
    if not path.suffix:
        from polyspec.prompts import load_prompts

        return load_prompts(source)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read prompts from {source} ({error}); give a text file with one a line") from error
    if not found:
        raise InputError(f"{source} holds no prompts")
    return found


def begin_from(folder: str | Path, model: PreTrainedModel) -> None:
    """Give `model` the weights of a checkpoint of the same kind and sizes, which may lack parts of a model that can be
    `added`; CheckpointError if it is another or damaged."""
    file = Path(folder) / SAFE_WEIGHTS_NAME
    try:
        lacking, beyond = load_model(model, str(file), strict=False)
        if wrong := [name for name in lacking if not name.startswith(getattr(model, "added", ()))] + list(beyond):
            raise ValueError(f"{wrong[0]} is not in both")
        stored = json.loads((Path(folder) / CONFIG_NAME).read_text())
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(
            f"cannot start from {file} ({reason}); give a folder with heads of the kind and sizes that are to be trained"
        ) from error
    for name, unsaid in (("even_embeddings", False), ("target_layers", None)):  # what the weights were trained to read
        if hasattr(model.config, name):
            setattr(model.config, name, stored.get(name, unsaid))


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder} ({error.strerror}); choose another output=") from error
