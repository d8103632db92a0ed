"""Speculative decoding for models that generate images, speech, text about images and recommendations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polyspec.errors import CheckpointError, ConfigError, InputError, PolyspecError, UnsupportedModelError

if TYPE_CHECKING:
    from polyspec.api import CustomGenerate, custom_generate
    from polyspec.metrics import DecodingStats
    from polyspec.outputs import Audio, Recommendation, Result
    from polyspec.pipelines import pipeline
    from polyspec.recipe import Recipe, recipes

# what needs torch and transformers is imported when it is first asked for
_LAZY = {
    "CustomGenerate": "polyspec.api",
    "custom_generate": "polyspec.api",
    "pipeline": "polyspec.pipelines",
    "DecodingStats": "polyspec.metrics",
    "Audio": "polyspec.outputs",
    "Recommendation": "polyspec.outputs",
    "Result": "polyspec.outputs",
    "Recipe": "polyspec.recipe",
    "recipes": "polyspec.recipe",
}

__all__ = [
    "Audio",
    "CheckpointError",
    "ConfigError",
    "CustomGenerate",
    "DecodingStats",
    "InputError",
    "PolyspecError",
    "Recipe",
    "Recommendation",
    "Result",
    "UnsupportedModelError",
    "custom_generate",
    "pipeline",
    "recipes",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'polyspec' has no attribute {name!r}")
