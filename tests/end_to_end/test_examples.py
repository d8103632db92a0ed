"""The scripts in `samples/examples` run as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "samples" / "examples"
LEAVES = {
    "draw.py": ["red-heart.png", "rainbow.png", "rocket.png"],
    "speak.py": ["hello.wav"],
    "recommend.py": [],
}
FETCHED = {"transformers_user.py": [], "ask.py": []}  # the language model has to be fetched


def run(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script)], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", LEAVES)
def test_an_example_runs(script: str, tmp_path: Path) -> None:
    assert run(script, tmp_path).strip()
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(LEAVES[script])
    assert all(f.stat().st_size > 500 for f in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", FETCHED)
def test_an_example_with_a_fetched_model_runs(script: str, tmp_path: Path) -> None:
    assert "tokens a call, exact" in run(script, tmp_path)


def test_every_example_is_run_and_short() -> None:
    assert {f.name for f in SCRIPTS.glob("*.py")} == {*LEAVES, *FETCHED}
    for file in SCRIPTS.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 17, f"{file.name} is long"
