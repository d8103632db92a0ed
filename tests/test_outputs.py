"""Where results are written: refused before any work, or written whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from polyspec import InputError
from polyspec.metrics import DecodingStats
from polyspec.outputs import Result
from polyspec.tasks import check_output, write_outputs


def result(pictures: int = 1) -> Result:
    return Result([Image.new("RGB", (4, 4))] * pictures, DecodingStats(recipe="sjd", guarantee="exact"))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        check_output(str(tmp_path / "nowhere" / "heart.png"))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        check_output(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write to"):
        check_output(str(tmp_path / "heart.png"))


@pytest.mark.parametrize("name", ["heart", "heart.nothing"])
def test_a_name_that_is_no_pictures_leaves_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.png"):
        write_outputs(result(), str(tmp_path / name), "heart", None)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left"):
        write_outputs(result(), str(tmp_path / "heart.png"), "heart", None)
    assert not list(tmp_path.iterdir())


def test_several_pictures_come_each_and_on_a_sheet(tmp_path: Path) -> None:
    paths = write_outputs(result(3), str(tmp_path / "heart.png"), "heart", None)
    assert [p.name for p in paths] == ["heart-0.png", "heart-1.png", "heart-2.png", "heart.png"]
    assert all(p.exists() for p in paths)
