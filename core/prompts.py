"""The prompts that come with polyspec, in `samples/prompts/`."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from polyspec.errors import unknown


def prompt_file(name: str) -> Any:
    """`samples/prompts/{name}.jsonl`, or the JSONL file whose path `name` is. Raises ConfigError if it is neither."""
    if name.endswith(".jsonl") and Path(name).is_file():
        return Path(name)
    folder = importlib.resources.files("polyspec.samples") / "prompts"
    known = {entry.name.removesuffix(".jsonl"): entry for entry in folder.iterdir() if entry.name.endswith(".jsonl")}
    if name not in known:
        raise unknown("prompt set", name, known)
    return known[name]


def load_prompts(name: str) -> list[str]:
    """The prompts of `samples/prompts/{name}.jsonl`, or of the JSONL file at that path, in file order. Raises ConfigError
    for an unknown name."""
    return [json.loads(line)["prompt"] for line in prompt_file(name).read_text(encoding="utf-8").splitlines() if line]
