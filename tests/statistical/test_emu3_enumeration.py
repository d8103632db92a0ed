"""Sampling under forced tokens and guidance draws from the model's own distribution, end to end through the pipeline.

A tiny Emu3 draws 2×2 codes, three possible ones a place: the distribution over all 81 pictures of a prompt is enumerated
by plain forward passes of the model and compared with counts of what every exact recipe draws.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from gtest import g_test
from recipe_needs import discrete_recipes, head_class_of
from tiny_emu3 import CODES, EOF, EOI, EOL, EOS, tiny_emu3
from torch import Tensor

import polyspec
from polyspec.modalities.image.target import Emu3Target, make_image_target

PROMPTS, NEGATIVE = ["red heart", "star"], "lowres blurry"
SIZE, TOP, TEMPERATURE, SCALE = (16, 16), 3, 0.4, 1.5
BATCH, SAMPLES, THRESHOLD = 2_500, 5_000, 1e-6
SMALL = {"length": 4, "window": 4, "nodes": 6}
HEADS = ["dflash", "eagle", "eagle2", "medusa"]
EXACT = [r.name for r in discrete_recipes("image") if r.guarantee == "exact" and not r.needs]


def next_codes(prefixes: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """The three likeliest codes `[N, 3]`, in the model's ids, and their probabilities behind `prefixes [N, L]`."""
    model, _ = tiny_emu3()
    visual = torch.tensor(model.vocabulary_mapping.image_tokens)
    with torch.no_grad():
        with_prompt, without = (model(x).logits[:, -1].log_softmax(-1) for x in (prefixes, negative))
    scores = (SCALE * (with_prompt - without) + without)[:, visual] / TEMPERATURE
    best = scores.topk(TOP)
    return visual[best.indices], best.values.softmax(-1)


@cache
def enumerated(prompt: str) -> dict[tuple[int, ...], float]:
    """Every picture's tokens and its probability."""
    _, processor = tiny_emu3()
    form = {"return_for_image_generation": True, "return_tensors": "pt", "ratio": "1:1", "image_area": 256}
    start, other = (processor(text=[text], **form)["input_ids"] for text in (prompt, NEGATIVE))
    done, probs = torch.empty(1, 0, dtype=torch.long), torch.ones(1)
    for _line in range(2):
        for _ in range(2):
            n = len(done)
            codes, p = next_codes(torch.cat([start.expand(n, -1), done], 1), torch.cat([other.expand(n, -1), done], 1))
            done = torch.cat([done.repeat_interleave(TOP, 0), codes.view(-1, 1)], dim=1)
            probs = (probs[:, None] * p).flatten()
        done = torch.cat([done, torch.full((len(done), 1), EOL)], dim=1)
    done = torch.cat([done, torch.tensor([EOF, EOI, EOS]).expand(len(done), -1)], dim=1)
    return dict(zip(map(tuple, done.tolist()), probs.tolist(), strict=True))


def fits(recipe: str, monkeypatch: pytest.MonkeyPatch, **knobs: Any) -> float:
    """The smaller of the two prompts' p-values for SAMPLES pictures each."""
    found: list[Tensor] = []

    def keep(self: Emu3Target, processor: Any, tokens: Tensor) -> list[Any]:
        found.append(self.ids[tokens])
        return []

    monkeypatch.setattr(Emu3Target, "negative_prompt", NEGATIVE)
    monkeypatch.setattr(Emu3Target, "pictures", keep)
    chosen = next(r for r in polyspec.recipes("image") if r.name == recipe)
    overrides = {k: v for k, v in SMALL.items() if k in chosen.knobs}
    if recipe in HEADS or knobs.get("init") == "drafter":
        overrides["heads"] = head_class_of(chosen).for_target(make_image_target(tiny_emu3()[0], 1.0))
    overrides |= {k: knobs.pop(k) for k in ("init",) if k in knobs}
    pipe = polyspec.pipeline("image", target=tiny_emu3(), recipe=recipe, overrides=overrides)
    sampling = {"size": SIZE, "do_sample": True, "temperature": TEMPERATURE, "top_k": TOP, "guidance_scale": SCALE}
    for batch in range(SAMPLES // BATCH):
        pipe(PROMPTS, images_per_prompt=BATCH, seed=10**6 * batch, **{**sampling, **knobs})
    values = []
    for row, prompt in enumerate(PROMPTS):
        expected = enumerated(prompt)
        drawn = torch.cat([tokens[row * BATCH : (row + 1) * BATCH] for tokens in found])
        rows, counts = drawn.unique(dim=0, return_counts=True)
        observed = dict(zip(map(tuple, rows.tolist()), counts.tolist(), strict=True))
        assert set(observed) <= set(expected)
        values.append(g_test(np.array([observed.get(k, 0) for k in expected]), np.array(list(expected.values()))))
    return min(values)


def test_there_is_something_to_get_wrong() -> None:
    assert CODES > TOP
    for prompt in PROMPTS:
        probs = sorted(enumerated(prompt).values())
        assert len(probs) == TOP**4 and sum(probs) == pytest.approx(1, abs=1e-4) and probs[-1] < 0.3


IN_DEFAULT_RUN = ("autoregressive", "sjd", "scd_gs", "eagle", "dflash")  # the others take a minute more together


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=() if r in IN_DEFAULT_RUN else pytest.mark.slow) for r in (*EXACT, *HEADS)]
)
def test_pictures_have_the_models_distribution(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits(recipe, monkeypatch) > THRESHOLD


@pytest.mark.parametrize("init", ["above", "random", "drafter"])
def test_also_when_windows_start_elsewhere(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits("scd_gs", monkeypatch, init=init) > THRESHOLD


def test_another_temperature_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits("sjd", monkeypatch, temperature=0.75 * TEMPERATURE) < THRESHOLD
