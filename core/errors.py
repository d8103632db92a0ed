"""The errors polyspec raises. Every one of them names what to change."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class PolyspecError(Exception):
    """Base of all errors raised on purpose by polyspec."""


class ConfigError(PolyspecError, ValueError):
    """An unknown name, or a knob outside its range."""


class InputError(PolyspecError, ValueError):
    """Data of the wrong shape, dtype, range or content: tokens, probabilities, prompts, files."""


class CheckpointError(PolyspecError, OSError):
    """A checkpoint that is missing, truncated, or not of the kind a recipe needs."""


class UnsupportedModelError(PolyspecError, TypeError):
    """A model that cannot be verified speculatively, with the reason."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """A ConfigError for `name`, an unknown `kind`, that lists the nearest of `known`, else the first of them."""
    names = sorted(known)
    listed = textwrap.shorten(", ".join(names), 240, placeholder=f" … ({len(names)} in all)")
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose one of: {listed}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}")
