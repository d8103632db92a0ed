"""How often drafts are accepted, beside how often they could be: 1 − TV(p, q), the most that any lossless rule keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor

from polyspec.decoding.beam import Beam


class Overlap:
    """Counts over every drafted token that was tried: one before which nothing was rejected."""

    def __init__(self) -> None:
        self.tried = self.accepted = self.overlap = 0.0

    def count(self, accepted: Tensor, tokens: Tensor, q: Tensor | None, p: Tensor) -> None:
        """Drafts `tokens [B, N]` drawn from `q [B, N, V]` (None: certain), of which each row kept `accepted [B]`."""
        if not tokens.shape[1]:
            return
        here = p[:, : tokens.shape[1]]
        common = here.gather(-1, tokens[..., None])[..., 0] if q is None else torch.minimum(here, q).sum(-1)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        tried = place <= accepted[:, None]
        self.tried += float(tried.sum())
        self.accepted += float((place < accepted[:, None]).sum())
        self.overlap += float((common * tried).sum())

    @property
    def figures(self) -> tuple[float, float] | None:
        """(share accepted, mean 1 − TV), None if nothing was counted."""
        return (self.accepted / self.tried, self.overlap / self.tried) if self.tried else None


@contextmanager
def watched(loop: Any) -> Iterator[Overlap]:
    """Count what the rule of a chain or Jacobi `loop` sees of runs with temperature; other loops count nothing."""
    seen = Overlap()
    name = next((n for n in ("verifier", "rule") if hasattr(loop, n)), None)
    if name is None or isinstance(loop, Beam):  # lists are not checked against distributions of tokens
        yield seen
        return
    original = getattr(loop, name)
    setattr(loop, name, watch(original, seen))
    try:
        yield seen
    finally:
        setattr(loop, name, original)


def watch(form: Callable[..., Any], seen: Overlap) -> Callable[..., Any]:
    """`form`, a rule or a partial of one, that also counts."""
    rule, given = (form.func, form.keywords) if isinstance(form, partial) else (form, {})

    def counted(tokens: Tensor, q: Tensor | None, p: Tensor, **knobs: Any) -> Any:
        found = rule(tokens, q, p, **knobs)
        # a chain's rule says how many it kept, a window's which
        accepted = found.accepted if hasattr(found, "accepted") else found[1].long().cumprod(1).sum(1)
        seen.count(accepted, tokens, q, p)
        return found

    update_wrapper(counted, rule)  # with the rule's label, and what it takes
    return partial(counted, **given)
