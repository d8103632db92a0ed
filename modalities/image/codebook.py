"""The nearest neighbours of every image token, for LANTERN: computed once, kept with the checkpoint."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from polyspec.errors import CheckpointError
from polyspec.verification import nearest_neighbours

NEIGHBOURS = 1000  # as many as LANTERN's k goes up to
FILE = "neighbours.safetensors"
QUICK = 2048  # tokens: a table this small is computed sooner than read

_TABLES: weakref.WeakKeyDictionary[PreTrainedModel, Tensor] = weakref.WeakKeyDictionary()


def neighbour_table(model: Any, codebook: Tensor) -> Tensor:
    """`[V, min(1000, V - 1)]` long, nearest first, of the codebook `[V, d]` of `model`.

    A large table is read from the file neighbours.safetensors of the checkpoint's folder, or else computed and written
    there if it can be. Raises CheckpointError for a file that is damaged or belongs to another codebook.
    """
    if model not in _TABLES:
        folder = Path(model.name_or_path or "")
        stored = model.name_or_path and folder.is_dir() and len(codebook) > QUICK
        table = read_table(folder / FILE, codebook) if stored and (folder / FILE).exists() else None
        if table is None:
            table = nearest_neighbours(codebook, min(NEIGHBOURS, len(codebook) - 1))
            if stored:
                write_table(folder / FILE, codebook, table)
        _TABLES[model] = table.to(codebook.device)
    return _TABLES[model]


def checksum(codebook: Tensor) -> str:
    return str(crc32(codebook.float().cpu().numpy().tobytes()))


def read_table(file: Path, codebook: Tensor) -> Tensor:
    try:
        with safe_open(file, "pt") as stored:
            table, note = stored.get_tensor("neighbours"), (stored.metadata() or {}).get("codebook")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); delete it, it will be made anew") from error
    expected = [len(codebook), min(NEIGHBOURS, len(codebook) - 1)]
    if list(table.shape) != expected or note != checksum(codebook):
        raise CheckpointError(
            f"{file} holds a table of {list(table.shape)} made for another codebook, this one needs {expected}; delete "
            "it, it will be made anew"
        )
    return table.long()


def write_table(file: Path, codebook: Tensor, table: Tensor) -> None:
    """Write the table whole or not at all; a folder that cannot be written to is left as it is."""
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".neighbours-")
        os.close(handle)
        try:
            save_file({"neighbours": table.to("cpu", torch.int32)}, name, {"codebook": checksum(codebook)})
            os.chmod(name, 0o644)
            os.replace(name, file)
        finally:
            Path(name).unlink(missing_ok=True)
    except (OSError, SafetensorError):
        return
