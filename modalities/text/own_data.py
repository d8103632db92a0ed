"""What a text target says by itself, to train draft heads on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyspec import pipelines
from polyspec.errors import ConfigError
from polyspec.modalities.text.sample import load_sample
from polyspec.target import make_target
from polyspec.tasks import whole_file
from polyspec.training.data import Corpus, continue_prompts, generate_corpus

LONGEST = 60  # tokens of a question that a model asks itself
SHORTEST = 8  # of which at least


class DataSource:
    """A causal language model that continues prompts. See `polyspec.training.train` for `settings`."""

    def __init__(self, settings: Mapping[str, Any]):
        from polyspec.training import read_prompts

        self.texts = read_prompts(settings.get("prompts") or "train_chat")
        device = settings.get("device") or pipelines.default_device()
        dtype, name = pipelines.as_dtype(settings.get("dtype"), device), settings.get("target")
        if name is None:
            self.model, self.tokenizer = load_sample(dtype=dtype, device=device)
        else:
            self.tokenizer = pipelines.load(AutoTokenizer.from_pretrained, name)
            self.model = pipelines.load(AutoModelForCausalLM.from_pretrained, name, dtype=dtype).to(device).eval()
        self.target = make_target(self.model)

    def corpus(self, folder: Path, own_prompts: int = 0, **knobs: Any) -> Corpus:
        """Continuations of the prompts and of `own_prompts` more that a chat model asks itself; other knobs as for
        `generate_corpus`."""
        texts = self.texts
        if own_prompts:
            texts = mixed(texts, self.ask(own_prompts, folder, knobs.get("batch", 32), knobs.get("seed", 0)))
        return generate_corpus(self.model, [encode(self.tokenizer, text) for text in texts], folder, **knobs)

    def ask(self, count: int, folder: Path, batch: int, seed: int) -> list[str]:
        """`count` different prompts: what the model writes in the user's place of its chat template (Magpie, 2406.08464),
        where that ends by itself. They are kept in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "prompts.jsonl"
        found = [json.loads(line)["prompt"] for line in path.open(encoding="utf-8")] if path.exists() else []
        header = opening(self.tokenizer)
        knobs = {"max_new_tokens": LONGEST, "temperature": 1.0, "top_k": 0, "top_p": 0.9}
        ends = set(stop_ids(self.model))
        with tqdm(desc="prompts", total=count, initial=min(len(found), count), unit="") as bar:
            drawn = 0
            while len(found) < count:
                for row in continue_prompts(self.model, [header] * batch, seed + len(found) + drawn, knobs):
                    if row[-1] in ends and len(row) - len(header) >= SHORTEST:
                        found.append(str(self.tokenizer.decode(row[len(header) : -1].tolist())).strip())
                drawn += batch
                found = list(dict.fromkeys(found))
                if not found and drawn >= 20 * batch:
                    raise ConfigError(
                        "the target asks itself nothing: behind its chat template's opening it writes no turn that ends; "
                        "set own_prompts=0 and give prompts"
                    )
                bar.update(min(len(found), count) - bar.n)
        with whole_file(path) as file:
            file.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in found), encoding="utf-8")
        return found[:count]


def opening(tokenizer: Any) -> list[int]:
    """The tokens of a chat up to where the user's first words stand; ConfigError without a chat template."""
    if not tokenizer.chat_template:
        raise ConfigError("own_prompts needs a tokenizer with a chat template; set own_prompts=0 and give prompts")
    mark = "polyspec-user-turn"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return tokenizer(text[: text.index(mark)])["input_ids"]


def stop_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def mixed(given: list[str], own: list[str]) -> list[str]:
    """Both lists, evenly interleaved, so that any first part of the corpus has its share of both."""
    places = [(i / len(texts), n, text) for n, texts in enumerate((given, own)) for i, text in enumerate(texts)]
    return [text for _, _, text in sorted(places, key=lambda place: place[:2])]


def encode(tokenizer: Any, text: str) -> list[int]:
    """A prompt's tokens, through the tokenizer's chat template if it has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text)["input_ids"]
