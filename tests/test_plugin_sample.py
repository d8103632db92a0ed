"""`samples/plugin`, a third party's modality with a recipe and a drafter of its own: installed, used, and exact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PLUGIN = Path(__file__).parents[1] / "samples" / "plugin"
TEXTS = ["a b c d e f g h", "b b q", "x y z a b c"]
COMPARE = """
import json, sys, torch, polyspec
pipe = polyspec.pipeline("revision", target=sys.argv[1], dtype="float32", device="cpu")
texts = json.loads(sys.argv[2])
inputs = pipe.tokenizer(texts, return_tensors="pt", padding=True)
plain = pipe.model.generate(**inputs, max_new_tokens=24, do_sample=False)
fast = pipe(texts, max_new_tokens=24, do_sample=False)
same = fast.outputs == pipe.tokenizer.batch_decode(plain, skip_special_tokens=True)
print(json.dumps([same, fast.stats.guarantee, sum(fast.stats.proposed_by_position) > 0]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin installed in it, from a copy: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PLUGIN, folder / "source")
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(source)], check=True, timeout=300)
    return folder / "site"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    build("t5").save_pretrained(folder)
    return folder


def run(site: Path, *command: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout or done.stderr


def test_its_texts_are_those_of_generate(site: Path, model: Path) -> None:
    answer = run(site, "-c", COMPARE, str(model), json.dumps(TEXTS))
    assert json.loads(answer.splitlines()[-1]) == [True, "exact", True]


def test_the_command_line_knows_it(site: Path, model: Path, tmp_path: Path) -> None:
    listed = run(site, "-m", "polyspec", "task=recipes", "modality=revision")
    assert "aggressive" in listed and "2205.10350" in listed
    said = run(site, "-m", "polyspec", "modality=revision", f"target={model}", "prompt=a b c", "recipe=aggressive",
               "recipe.max_ngram=2", "sampling.do_sample=false", f"output={tmp_path}/revised.txt")  # fmt: skip
    assert "exact" in said
    assert (tmp_path / "revised.txt").read_text().strip() in said
    wrong = run(site, "-m", "polyspec", "modality=revision", f"target={model}", "prompt=a", "recipe.max_ngram=0",
                "recipe=aggressive", code=2)  # fmt: skip
    assert wrong.count("\n") == 1 and "max_ngram" in wrong


def test_it_is_as_short_as_the_readme_says() -> None:
    files = [f for f in PLUGIN.rglob("*") if f.suffix in (".py", ".yaml", ".toml")]
    assert sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files) <= 100
