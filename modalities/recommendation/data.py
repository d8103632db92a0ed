"""Histories to train and measure recommenders on: who interacted with what, in order, and what came next.

* `movielens()`: MovieLens-100K. Its licence forbids redistribution, so it is fetched when it is first asked for, out of the
  wheel `recbole`, which pip downloads; the wheel is never installed or imported.
* `parquet_splits(folder)`: the splits of AtSpeed (2410.05165; Amazon Beauty and Games), or others in their form.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock

from polyspec.errors import CheckpointError, InputError

WHEEL = "recbole==1.2.1"
FOLDER = "recbole/dataset_example/ml-100k"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}


@dataclass(frozen=True, slots=True)
class Example:
    """What a user had interacted with, oldest first, and what came next (one item or more)."""

    user: int
    history: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Interactions:
    """train: every user's items in order; valid and test: examples. items: ids there are; titles and semantic_ids
    (tuples of codes, one a level) where the source has them."""

    train: list[list[int]]
    valid: list[Example]
    test: list[Example]
    items: list[int]
    titles: dict[int, str] = field(default_factory=dict)
    semantic_ids: dict[int, tuple[int, ...]] = field(default_factory=dict)


def leave_last_out(
    sequences: Mapping[int, Sequence[int]], titles: Mapping[int, str] | None = None, items: Sequence[int] | None = None
) -> Interactions:
    """The split in common use for sequences (SASRec, 1808.09781): a user's last item is for testing, the one before for
    validation, the rest for training. Users with fewer than three items are for training only. items: ids there are, by
    default those that occur. InputError if there is nothing."""
    if not any(len(s) for s in sequences.values()):
        raise InputError("there are no interactions")
    long = {user: list(s) for user, s in sequences.items() if len(s) >= 3}
    known = sorted({i for s in sequences.values() for i in s} if items is None else items)
    return Interactions(
        train=[list(s[:-2]) if len(s) >= 3 else list(s) for s in sequences.values() if len(s)],
        valid=[Example(user, s[:-2], s[-2:-1]) for user, s in long.items()],
        test=[Example(user, s[:-1], s[-1:]) for user, s in long.items()],
        items=known,
        titles=dict(titles or {}),
    )


# -- MovieLens -----------------------------------------------------------------------------------------------------------


def movielens(cache_dir: str | Path | None = None) -> Interactions:
    """MovieLens-100K: 100,000 ratings of 1,682 films by 943 users, every rating an interaction, by time; leave-last-out.

    cache_dir: by default $POLYSPEC_CACHE or ~/.cache/polyspec. CheckpointError if it cannot be fetched or is damaged.
    """
    folder = fetch_movielens(cache_dir)
    ratings = np.loadtxt(folder / "ml-100k.inter", skiprows=1, dtype=np.int64, delimiter="\t")
    order = np.lexsort((np.arange(len(ratings)), ratings[:, 3], ratings[:, 0]))
    sequences: dict[int, list[int]] = {}
    for user, item, *_ in ratings[order].tolist():
        sequences.setdefault(user, []).append(item)
    titles = {}
    for line in (folder / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]:
        item, title, year, *_ = line.split("\t")
        titles[int(item)] = f"{title} ({year})" if year else title
    return leave_last_out(sequences, titles, sorted(titles))


def fetch_movielens(cache_dir: str | Path | None = None) -> Path:
    """The folder that holds MovieLens-100K, fetched (2 MB) if it is not there yet; safe to call from several processes."""
    root = Path(cache_dir or os.environ.get("POLYSPEC_CACHE") or Path.home() / ".cache" / "polyspec").expanduser()
    folder = root / "ml-100k"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "ml-100k.lock"):
            if not all((folder / name).is_file() for name in SHA256):
                download_movielens(folder)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot store MovieLens-100K in {root} ({error}); set POLYSPEC_CACHE elsewhere"
        ) from error
    for name, expected in SHA256.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise CheckpointError(f"{folder / name} is damaged; delete that folder and retry")
    return folder


def download_movielens(folder: Path) -> None:
    """Have pip download the wheel, and write its two files to `folder`, or nothing."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        said = pip_download(WHEEL, Path(staging))
        wheels = list(Path(staging).glob("*.whl"))
        if not wheels:
            raise CheckpointError(
                f"cannot fetch MovieLens-100K: pip could not download {WHEEL} ({said or 'no reason given'}); connect to a "
                "package index, or put the files into the folder " + str(folder)
            )
        whole = Path(staging) / "whole"
        whole.mkdir()
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                for name in SHA256:
                    (whole / name).write_bytes(archive.read(f"{FOLDER}/{name}"))
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise CheckpointError(f"{wheels[0].name} is damaged or not the expected wheel ({error}); retry") from error
        shutil.rmtree(folder, ignore_errors=True)
        whole.replace(folder)


def pip_download(wheel: str, folder: Path) -> str:
    """Download `wheel` into `folder`; returns the last line of pip's complaint, "" if there is none."""
    own = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else None
    other = shutil.which("pip") or shutil.which("pip3")
    command = own or ([other] if other else None)
    if command is None:
        return "no pip to download it with: python -m ensurepip"
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=1", "--quiet"]
    done = subprocess.run(
        [*command, "download", wheel, "--dest", str(folder), *options], capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return errors[-1].removeprefix("ERROR: ") if errors else ""


# -- splits in files -----------------------------------------------------------------------------------------------------


def parquet_splits(folder: str | Path) -> Interactions:
    """The splits in `folder`: items.parquet (item_id, semantic_id, title if known), train.parquet, valid.parquet and
    test.parquet (user, items). A user's history in validation is what is for training, in testing that and validation.
    Interactions with items that items.parquet lacks are left out, and a warning says how many.

    CheckpointError if a file is missing or damaged; needs pyarrow (pip install polyspec[train]).
    """
    folder = Path(folder)
    table = read_parquet(folder / "items.parquet", ("item_id", "semantic_id"))
    known = [int(i) for i in table["item_id"]]
    titles = {i: str(t) for i, t in zip(known, table.get("title", []), strict=False)}
    semantic = {i: as_codes(s, folder) for i, s in zip(known, table["semantic_id"], strict=True)}
    rows = {name: read_parquet(folder / f"{name}.parquet", ("user", "items")) for name in ("train", "valid", "test")}
    per_user = {name: dict(zip(t["user"], t["items"], strict=True)) for name, t in rows.items()}
    items, dropped = set(known), 0
    for split in per_user.values():
        for user, row in split.items():
            split[user] = [i for i in row or [] if i in items]
            dropped += len(row or []) - len(split[user])
    if dropped:
        warnings.warn(f"{folder}: left out {dropped} interactions with items that items.parquet lacks", stacklevel=2)
    train, valid, test = (per_user[name] for name in ("train", "valid", "test"))
    return Interactions(
        train=[list(items) for items in train.values() if items],
        valid=[Example(u, list(train[u]), list(v)) for u, v in valid.items() if v and train.get(u)],
        test=[Example(u, [*train[u], *valid.get(u, [])], list(t)) for u, t in test.items() if t and train.get(u)],
        items=known,
        titles=titles,
        semantic_ids=semantic,
    )


def read_parquet(path: Path, columns: Sequence[str]) -> dict[str, list]:
    """A parquet file's columns as lists; CheckpointError if it cannot be read or lacks one of `columns`."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise CheckpointError("reading parquet files needs pyarrow: pip install 'polyspec[train]'") from error
    try:
        found = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise CheckpointError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    missing = [c for c in columns if c not in found]
    if missing:
        raise CheckpointError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(found)}")
    return found


def as_codes(spelt: Sequence[str], folder: Path) -> tuple[int, ...]:
    """`<a_47>, <b_103>, …` as (47, 103, …)."""
    try:
        return tuple(int(code.rsplit("_", 1)[1].rstrip(">")) for code in spelt)
    except (AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/items.parquet has a semantic id {spelt!r}; expected <a_47>, <b_103>, …"
        ) from error
