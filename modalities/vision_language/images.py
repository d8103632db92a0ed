"""Pictures from paths, and prompts that say where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from polyspec.errors import InputError


def open_image(source: Image.Image | str | PathLike[str]) -> Image.Image:
    """A picture in RGB, what is transparent on white. InputError if the file is missing, no image, or truncated."""
    if not isinstance(source, Image.Image | str | PathLike):
        raise InputError(f"an image must be a PIL image or a path, got {type(source).__name__}")
    if not isinstance(source, Image.Image) and not Path(source).is_file():
        raise InputError(f"there is no image {source}; give the path of a picture")
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        picture.load()
        if picture.mode != "RGB":
            solid = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{source} is not an image that can be read; give a PNG, JPEG or WebP file") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's for damaged files
        raise InputError(f"the image {source} is damaged or truncated ({error}); give a whole file") from error
    return picture


def images_of_prompts(image: Any, count: int) -> list[list[Image.Image]]:
    """The pictures of each of `count` prompts: none; one for all; all for a single prompt; or a list with an entry (none,
    one or a list) a prompt. InputError if they do not fit."""
    if image is None or not isinstance(image, list | tuple):
        own = [] if image is None else [open_image(image)]
        return [own] * count
    if count == 1 and not any(isinstance(one, list | tuple) for one in image):
        return [[open_image(one) for one in image]]
    if len(image) != count:
        raise InputError(f"{len(image)} images or lists of images for {count} prompts; give an entry for each prompt")
    return [images_of_prompts(list(one) if isinstance(one, list | tuple) else one, 1)[0] for one in image]


def content(prompt: str, pictures: Sequence[Image.Image], placeholder: str | None) -> list[dict[str, Any]]:
    """A chat message's parts: pictures where `placeholder` stands in the prompt, or in front of it if it stands nowhere.

    InputError if there are placeholders, but not as many as pictures."""
    held = prompt.count(placeholder) if placeholder else 0
    if held == 0:
        return [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
    if held != len(pictures):
        raise InputError(
            f"the prompt holds {held} image placeholders ({placeholder}), but {len(pictures)} images are given; write one "
            "for each image, or none to have the images in front"
        )
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(prompt.split(str(placeholder))):
        parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return parts
