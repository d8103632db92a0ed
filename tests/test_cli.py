"""The command line as a user meets it: its table, its one-line errors, its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import polyspec
from polyspec.cli import main


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "polyspec", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_the_table_of_recipes_names_every_recipe_with_its_guarantee(tmp_path: Path) -> None:
    done = run("task=recipes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for recipe in polyspec.recipes():
        assert recipe.name in done.stdout
        assert recipe.guarantee in done.stdout


def test_the_table_of_recipes_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from polyspec.listing import show; show(None); "
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("recipe=sdj",), ("unknown recipe 'sdj'", "'sjd'")),
        (("modality=imagee",), ("unknown modality 'imagee'", "'image'")),
        (("task=generat",), ("unknown task 'generat'", "'generate'")),
        (("promt=x",), ("unknown setting 'promt'", "'prompt'")),
        (("task=bench", "modality=text", "bench.batch_size=2"), ("unknown setting 'bench.batch_size'", "'bench.batch'")),
        (("modality=tex", "promt=x"), ("unknown modality 'tex'",)),
        (("sampling.temprature=1",), ("unknown setting 'sampling.temprature'", "'sampling.temperature'")),
        ((), ("no prompt",)),
        (("prompt=red heart", "output=nowhere/heart.png"), ("no folder nowhere",)),
        (("prompt=red heart", "target=nowhere"), ("cannot load nowhere",)),
        (("prompt=red heart", "dtype=float3"), ("unknown dtype 'float3'",)),
        (("prompt=red heart", "recipe=sjd", "recipe.window=0"), ("must be a whole number",)),
        (("prompt=red heart", "recipe=sjd", "recipe.init=lefft"), ("unknown init 'lefft'", "'left'")),
        (("modality=text", "prompt=x", "recipe=rest", "recipe.datastore=nowhere"), ("cannot read the datastore nowhere",)),
        (
            ("modality=text", "prompt=x", "recipe=dare", "recipe.pools=nowhere", "recipe.learn=false"),
            ("cannot read the pools nowhere",),
        ),
        (("task=train",), ("set train.data.path=…",)),
        (("task=train", "train=eagel"), ("unknown train 'eagel'", "'eagle'")),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(
    arguments: tuple[str, ...],
    fragments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["polyspec", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("polyspec: error: ")
    for fragment in fragments:
        assert fragment in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def heart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The README's first command."""
    folder = tmp_path_factory.mktemp("heart")
    return folder, run("prompt=red heart", cwd=folder)


def test_the_first_command_draws_a_picture_named_after_the_prompt(heart: tuple[Path, subprocess.CompletedProcess]) -> None:
    from PIL import Image

    folder, done = heart
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.iterdir()] == ["red-heart.png"]
    with Image.open(folder / "red-heart.png") as picture:
        assert picture.size == (64, 64)
        colours = picture.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert colours[0] > colours[1] and colours[0] > colours[2], "a red heart is reddish"


def test_the_first_command_reports_calls_and_its_exact_recipe(heart: tuple[Path, subprocess.CompletedProcess]) -> None:
    _, done = heart
    assert "exact" in done.stdout and "256" in done.stdout and "wrote red-heart.png" in done.stdout
    assert done.stderr == ""


def test_the_bench_writes_figures_and_a_plot(tmp_path: Path) -> None:
    small = ("bench.count=1", "bench.repeats=1", "dtype=float32")
    done = run("task=bench", "modality=image", "bench.recipes=[sjd]", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench-image" / "results.json").read_text())
    assert [r["label"] for r in report["results"]] == ["transformers", "plain loop", "sjd"]
    assert report["dtype"] == "float32" and report["seed"] == 0 and report["machine"]["torch"]
    assert all(r["ceiling"] > 0 and r["efficiency"] > 0 for r in report["results"])
    assert (tmp_path / "bench-image" / "results.png").stat().st_size > 1000
