"""Recipes: every file is complete, every name leads to a method, and plugins add theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
from hydra.utils import get_object
from recipe_needs import by_name, overrides
from tiny_models import target

import polyspec
from polyspec.errors import ConfigError
from polyspec.recipe import GUARANTEES, Recipe, build, find_recipe, make_length


@by_name(polyspec.recipes())
def test_a_recipe_describes_itself(recipe: Recipe) -> None:
    assert recipe.guarantee in GUARANTEES
    assert recipe.summary.endswith(".") and len(recipe.summary) < 160
    assert recipe.modalities
    assert recipe.name == "autoregressive" or recipe.paper.replace(".", "").isdigit()
    assert (files("polyspec.conf") / "recipe" / f"{recipe.name}.yaml").is_file()


@by_name(polyspec.recipes("text"))
def test_a_recipe_is_built_from_its_defaults_and_its_needs(recipe: Recipe) -> None:
    needed = {k: v for k, v in overrides(recipe, target("llama")).items() if k in recipe.needs}
    method = build(recipe, needed)
    assert method.recipe is recipe
    assert method.loop is not None and method.length is not None
    assert method.drafter() is not method.drafter(), "runs share no state"


@by_name(polyspec.recipes())
def test_a_rule_promises_no_less_than_its_recipe(recipe: Recipe) -> None:
    for part in ("verifier", "rule", "walk"):
        if (node := recipe.config.loop.get(part)) is not None:
            rule = get_object(node._target_)
            assert GUARANTEES.index(rule.guarantee) <= GUARANTEES.index(recipe.guarantee)


def test_recipes_are_listed_by_modality() -> None:
    everywhere = {r.name for r in polyspec.recipes()}
    assert {r.name for r in polyspec.recipes("text")} <= everywhere
    assert "autoregressive" in {r.name for r in polyspec.recipes("image")}
    assert len(everywhere) == len(polyspec.recipes()), "names are unique"


def test_the_function_recipes_stays_a_function_whatever_is_imported() -> None:
    import polyspec.api
    import polyspec.pipelines

    for name in polyspec.__all__:
        assert callable(getattr(polyspec, name)), name


def test_knobs_are_what_can_be_overridden() -> None:
    sjd = find_recipe("sjd")
    assert sjd.knobs == {"window": 16, "init": "left", "refresh": None}
    method = build(sjd, {"window": 7, "init": "random"})
    assert method.length.next() == 7
    assert type(method.loop.init).__name__ == "RandomTokens"
    assert find_recipe("sjd").knobs["window"] == 16, "an override is for one method"


def test_a_length_is_a_number_a_policy_by_name_or_a_policy_spelt_out() -> None:
    assert make_length(3).next() == 3
    assert type(make_length("auto")).__name__ == "Auto"
    assert make_length({"_target_": "polyspec.lengths.Fixed", "length": 9}).next() == 9


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_of_recipes_needs_neither_torch_nor_transformers() -> None:
    code = "import polyspec, sys; polyspec.recipes(); print({'torch', 'transformers'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


RECIPE = """
name: {name}
paper: "2211.17192"
guarantee: exact
summary: A plugin's own method.
modalities: [smell]
draws: coupled
loop:
  _target_: polyspec.decoding.chain.Chain
  verifier: {{_target_: polyspec.verification.gumbel_match, _partial_: true}}
"""


def wheel(folder: Path, recipe: str) -> Path:
    """A wheel that brings the modality `smell` and one recipe."""
    info = "polyspec_smell-1.0.dist-info"
    content = {
        "polyspec_smell/__init__.py": "",
        "polyspec_smell/pipeline.py": "class Pipeline:\n    def __init__(self, **kwargs):\n        self.kwargs = kwargs\n",
        "polyspec_smell/conf/__init__.py": "",
        f"polyspec_smell/conf/recipe/{recipe}.yaml": RECIPE.format(name=recipe),
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: polyspec-smell\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[polyspec.modalities]\nsmell = polyspec_smell\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*content, f"{info}/RECORD"])
    path = folder / "polyspec_smell-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return path


def install(built: Path, where: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(where), str(built)]
    subprocess.run(command, check=True, timeout=120)


def test_an_installed_plugin_adds_its_modality_its_recipes_and_its_pipeline(tmp_path: Path) -> None:
    install(wheel(tmp_path, "sniffing"), tmp_path / "site")
    answer = run_python(
        """
        import json, polyspec
        pipe = polyspec.pipeline("smell", recipe="sniffing")
        method = polyspec.custom_generate("sniffing").method
        print(json.dumps([[r.name for r in polyspec.recipes("smell")], pipe.kwargs, method.recipe.guarantee]))
        """,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert json.loads(answer) == [["sniffing"], {"recipe": "sniffing"}, "exact"]
    with pytest.raises(ConfigError, match="unknown modality"):
        polyspec.recipes("smell")


def test_a_plugin_cannot_replace_a_recipe_behind_ones_back(tmp_path: Path) -> None:
    install(wheel(tmp_path, "sjd"), tmp_path / "site")
    answer = run_python(
        """
        import polyspec
        try:
            polyspec.recipes()
        except polyspec.ConfigError as error:
            print(error)
        """,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert "'sjd'" in answer and "polyspec_smell" in answer
