"""The target's hidden states on a corpus, computed once and kept on disk.

A folder holds one file a layer, `layer-28.bin`: bfloat16 `[tokens of the corpus, d]`, the rows of the corpus end to end
(each row's last token has no state: nothing is drafted after it). Computing again continues where it stopped, also
where the corpus has grown, and computes only layers that are not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from polyspec.errors import CheckpointError
from polyspec.target import Target
from polyspec.training.data import Corpus, joined

FEATURES = "features"  # folder inside the corpus's


class Features:
    """Hidden states `[T-1, d]` of any corpus row, for several layers, read from disk as they are asked for."""

    def __init__(self, folder: Path, layers: Sequence[int], width: int, corpus: Corpus):
        self.corpus, self.layers, self.width = corpus, tuple(layers), width
        self.maps = [np.memmap(layer_file(folder, layer), np.int16, "r").reshape(-1, width) for layer in layers]

    def row(self, index: int) -> tuple[Tensor, ...]:
        """One bfloat16 tensor `[T-1, d]` a layer."""
        start, end = self.corpus.starts[index], self.corpus.starts[index + 1] - 1
        return tuple(torch.from_numpy(np.array(m[start:end])).view(torch.bfloat16) for m in self.maps)


class JoinedFeatures:
    """The features of several corpora as those of one with all their rows, one corpus behind the other."""

    def __init__(self, parts: Sequence[Features]):
        self.parts, self.starts = parts, np.cumsum([0, *(len(p.corpus) for p in parts)])
        self.corpus = joined([p.corpus for p in parts])

    def row(self, index: int) -> tuple[Tensor, ...]:
        """One bfloat16 tensor `[T-1, d]` a layer."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part].row(index - int(self.starts[part]))


def stored_features(folder: str | Path, corpus: Corpus, layers: Sequence[int], width: int) -> Features:
    """What an earlier training left of `corpus`, which was read from `folder`. Raises CheckpointError if any are missing."""
    folder = Path(folder)
    if lacking := [n for n in layers if progress_of(folder / FEATURES, n, corpus, width) < len(corpus)]:
        raise CheckpointError(
            f"{folder} lacks the hidden states of layers {lacking}; train heads with train.data.folder={folder} first"
        )
    return Features(folder / FEATURES, layers, width, corpus)


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:02}.bin"


@torch.no_grad()
def hidden_states(
    target: Target, rows: Sequence[Tensor], prompts: Sequence[int], **inputs: Any
) -> list[tuple[Tensor, ...]]:
    """What a drafter would see while `target` generates `rows`: for each row its hidden states `[T-1, d]`, a tensor a
    layer of `target.hidden_layers`. The prompt is prefilled, with `inputs` (as padded on the left), the rest forwarded, as
    in decoding."""
    device = target.device
    starts = [row[:n] for row, n in zip(rows, prompts, strict=True)]
    start = pad_sequence(starts, batch_first=True, padding_side="left")
    mask = pad_sequence(list(map(torch.ones_like, starts)), batch_first=True, padding_side="left")
    rest = pad_sequence([row[n - 1 : -1] for row, n in zip(rows, prompts, strict=True)], batch_first=True)
    width = start.shape[1] + rest.shape[1]
    first = target.prefill(start.to(device), mask.to(device), capacity=width, **inputs)
    then = target.forward(rest.to(device)).hidden
    before = first.hidden if first is not None else tuple(h[:, :0] for h in then)
    return [
        tuple(torch.cat([b[i, : n - 1], t[i, : len(row) - n]]) for b, t in zip(before, then, strict=True))
        for i, (row, n) in enumerate(zip(rows, prompts, strict=True))
    ]


def compute_features(
    target: Target,
    corpus: Corpus,
    layers: Sequence[int],
    folder: str | Path,
    batch: int = 8,
    inputs: Callable[[range], Mapping[str, Any]] | None = None,
) -> Features:
    """Hidden states of `layers` (indices into transformers' hidden_states) for the whole corpus, `batch` rows at once.

    inputs: as for `generate_corpus`. Raises CheckpointError if `folder` belongs to another corpus or target.
    """
    folder, width = Path(folder), target.config.hidden_size
    folder.mkdir(parents=True, exist_ok=True)
    done = {layer: progress_of(folder, layer, corpus, width) for layer in layers}
    missing = [layer for layer in layers if done[layer] < len(corpus)]
    if missing:
        begin = min(done[layer] for layer in missing)
        target.hidden_layers = tuple(missing)
        shape = (len(corpus.tokens), width)
        maps = []
        for layer in missing:
            path = layer_file(folder, layer)
            maps.append(np.memmap(path, np.int16, "r+" if path.exists() else "w+", shape=shape))
        for first in tqdm(range(begin, len(corpus), batch), desc="hidden states", unit=" batches"):
            index = range(first, min(first + batch, len(corpus)))
            extra = inputs(index) if inputs else {}
            lengths = [int(corpus.prompts[i]) for i in index]
            found = hidden_states(target, [corpus.row(i) for i in index], lengths, **extra)
            for i, states in zip(index, found, strict=True):
                at = slice(corpus.starts[i], corpus.starts[i + 1] - 1)
                for m, h in zip(maps, states, strict=True):
                    m[at] = h.to(torch.bfloat16).cpu().view(torch.int16).numpy()
            if first // batch % 32 == 31 or index.stop == len(corpus):
                for layer, m in zip(missing, maps, strict=True):
                    m.flush()
                    note_progress(folder, layer, corpus, width, index.stop)
    return Features(folder, layers, width, corpus)


def progress_of(folder: Path, layer: int, corpus: Corpus, width: int) -> int:
    """Rows of `corpus` that `folder` already has for `layer`. A corpus may have grown since, not changed."""
    note = layer_file(folder, layer).with_suffix(".json")
    if not note.exists():
        layer_file(folder, layer).unlink(missing_ok=True)
        return 0
    stored = json.loads(note.read_text())
    if stored["rows"] > len(corpus) or stored != progress_note(corpus, width, stored["rows"]):
        raise CheckpointError(
            f"{folder} holds the hidden states of another corpus or target; delete it or choose another folder"
        )
    return stored["rows"]


def progress_note(corpus: Corpus, width: int, rows: int) -> dict[str, int]:
    return {"rows": rows, "width": width, "checksum": crc32(corpus.tokens[: corpus.starts[rows]].tobytes())}


def note_progress(folder: Path, layer: int, corpus: Corpus, width: int, rows: int) -> None:
    note = layer_file(folder, layer).with_suffix(".json")
    note.write_text(json.dumps(progress_note(corpus, width, rows)))
