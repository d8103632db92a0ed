"""The prompt sets that come with polyspec."""

import importlib.resources
import json
from pathlib import Path

import pytest

import polyspec
from polyspec.prompts import load_prompts


def test_prompt_sets_have_their_sizes_and_do_not_overlap() -> None:
    chat, copy, train = (load_prompts(name) for name in ("chat", "copy", "train_chat"))
    preferences, before = load_prompts("preferences"), load_prompts("train_preferences")
    assert len(preferences) >= 40 and len(before) >= 20
    assert len(chat) >= 32 and len(copy) >= 12 and len(train) >= 600
    everything = chat + copy + train + preferences + before
    assert len({" ".join(prompt.lower().split()) for prompt in everything}) == len(everything)
    assert all(prompt.strip() == prompt and len(prompt) > 10 for prompt in everything)
    assert all(90 <= len(prompt.split()) <= 260 for prompt in copy)


def test_prompt_lines_have_unique_ids_and_a_category() -> None:
    folder = Path(str(importlib.resources.files("polyspec.samples"))) / "prompts"
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(row.keys() == {"id", "category", "prompt"} and row["category"] for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)


def test_unknown_prompt_set_suggests_the_nearest() -> None:
    with pytest.raises(polyspec.ConfigError, match="chat"):
        load_prompts("chats")
