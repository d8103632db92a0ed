"""Where things lie, and writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from polyspec.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed when the block succeeds: no half-written file is left."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def shipped(name: str) -> Path:
    """The file or folder `name` of the samples that come with the package."""
    return Path(str(files("polyspec.samples"))) / name


def cache_root(folder: str | Path | None = None) -> Path:
    """Where things are kept between runs: `folder`, $POLYSPEC_CACHE, $XDG_CACHE_HOME/polyspec or ~/.cache/polyspec."""
    root = folder or os.environ.get("POLYSPEC_CACHE")
    if root is None or not str(root):
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyspec"
    return Path(root).expanduser()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
