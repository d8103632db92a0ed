"""The prompts that come with polyspec, in `samples/prompts/`."""

from __future__ import annotations

import importlib.resources
import json

from polyspec.errors import unknown


def load_prompts(name: str) -> list[str]:
    """The prompts of `samples/prompts/{name}.jsonl`, in file order. Raises ConfigError for an unknown name."""
    folder = importlib.resources.files("polyspec.samples") / "prompts"
    known = {entry.name.removesuffix(".jsonl"): entry for entry in folder.iterdir() if entry.name.endswith(".jsonl")}
    if name not in known:
        raise unknown("prompt set", name, known)
    return [json.loads(line)["prompt"] for line in known[name].read_text(encoding="utf-8").splitlines() if line]
