"""Training draft heads and draft models on what a target generates itself.

`train` is the whole way, from a `train` configuration (conf/train/): the target continues prompts (data), its hidden
states are computed once (features), the head learns from both (trainer, objectives). Every stage continues where an
interrupted run stopped. For targets that are not text models, call the stages with a Target and a Corpus of your own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyspec.errors import CheckpointError, ConfigError, InputError
from polyspec.training.data import Corpus, corpus_of, generate_corpus, load_corpus
from polyspec.training.features import Features, compute_features
from polyspec.training.trainer import Schedule, train_head

__all__ = [
    "Corpus",
    "Features",
    "Schedule",
    "compute_features",
    "corpus_of",
    "generate_corpus",
    "load_corpus",
    "read_prompts",
    "train",
    "train_head",
]


def train(config: Mapping[str, Any]) -> Path:
    """Train what `config`, a composed `train` group, describes; returns the folder of the result.

    Keys: target (folder, hub id, None: the text sample), output, device, dtype, prompts, data (arguments of
    `generate_corpus`, and `folder`), vocabulary (size of the trimmed one, None: all tokens), head, objective, schedule
    (things to instantiate). Raises ConfigError, InputError or CheckpointError before anything long starts.
    """
    from hydra.utils import instantiate
    from omegaconf import DictConfig, OmegaConf

    from polyspec.target import make_target

    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)  # type: ignore[assignment]
    if settings.get("modality", "text") != "text":
        raise ConfigError(
            f"the command line trains heads for modality=text, not {settings['modality']}; for other targets call "
            "polyspec.training.compute_features and train_head with a Target and a Corpus"
        )
    output = Path(settings.get("output") or f"outputs/{settings['name']}")
    schedule, objective = instantiate(settings["schedule"]), instantiate(settings["objective"])
    texts = read_prompts(settings["prompts"])
    model, tokenizer = load_text_target(settings)
    target = make_target(model)
    make_folder(output)

    data = dict(settings["data"])
    folder = Path(data.pop("folder", None) or output / "data")
    corpus = generate_corpus(model, [encode(tokenizer, text) for text in texts], folder, **data)
    size = settings.get("vocabulary")
    vocabulary = corpus.frequent(size, target.vocab_size) if size and size < target.vocab_size else None
    head = instantiate(settings["head"])(target, vocabulary=vocabulary)

    depth = target.config.num_hidden_layers
    read = list(getattr(head.config, "target_layers", None) or ())
    layers = [*read, depth] if objective.last_hidden else read
    features = compute_features(target, corpus, layers, folder / "features", batch=settings.get("feature_batch", 8))
    target.hidden_layers = ()
    train_head(head, target, corpus, features, objective, schedule, output)
    if not read:  # a model of its own, to be loaded as any other
        tokenizer.save_pretrained(output)
    return output


def load_text_target(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The (model, tokenizer) that `target`, `device` and `dtype` name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from polyspec import pipelines

    device = settings.get("device") or pipelines.default_device()
    dtype, name = pipelines.as_dtype(settings.get("dtype"), device), settings.get("target")
    if name is None:
        from polyspec.modalities.text.sample import load_sample

        return load_sample(dtype=dtype, device=device)
    tokenizer = pipelines.load(AutoTokenizer.from_pretrained, name)
    return pipelines.load(AutoModelForCausalLM.from_pretrained, name, dtype=dtype).to(device).eval(), tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """A prompt's tokens, through the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text)["input_ids"]


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


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder} ({error.strerror}); choose another output=") from error
