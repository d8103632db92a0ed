"""The image sample at length: Gumbel recipes draw the plain loop's pictures, LANTERN's bounds hold for every token."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import polyspec
from polyspec.drafting.eagle import EagleModel
from polyspec.modalities.image.target import make_image_target
from polyspec.prompts import load_prompts
from polyspec.verification import lantern, lantern_pp

aggregate = import_module("polyspec.verification.lantern").aggregate
PROMPTS = (load_prompts("emoji") * 2)[:64]

pytestmark = pytest.mark.slow


@cache
def loaded() -> Any:
    pipe = polyspec.pipeline("image", recipe="autoregressive", dtype="float32")
    return pipe.model, pipe.processor


def pictures(recipe: str, batch: int, **knobs: Any) -> list[bytes]:
    pipe = polyspec.pipeline("image", target=loaded(), recipe=recipe)
    found: list[bytes] = []
    for first in range(0, len(PROMPTS), batch):
        seeds = list(range(first, first + batch))
        found += [p.tobytes() for p in pipe(PROMPTS[first : first + batch], seed=seeds, **knobs).outputs]
    return found


@pytest.mark.parametrize("recipe", ["gumbel_jacobi", "gumbel_coupled"])
@pytest.mark.parametrize("batch", [1, 8])
def test_shared_noise_draws_the_plain_loop_s_64_pictures_under_guidance(recipe: str, batch: int) -> None:
    knobs = {"do_sample": True, "temperature": 1.0, "guidance_scale": 2.0}
    assert pictures(recipe, batch, **knobs) == pictures("autoregressive", 8, **knobs)


@pytest.mark.parametrize("rule", [partial(lantern, delta=0.1, k=100), partial(lantern_pp, lam=5.0, k=10)])
def test_lantern_s_bound_holds_for_every_drafted_token_of_64_pictures(rule: Any) -> None:
    model, _ = loaded()
    pipe = polyspec.pipeline(
        "image",
        target=loaded(),
        recipe="lantern_pp",
        overrides={"heads": EagleModel.for_target(make_image_target(model, 1.0))},
    )
    checked = SimpleNamespace(tokens=0, relaxed=0)

    def verify(tokens: Tensor, q: Tensor | None, p: Tensor, *, neighbours: Tensor, **knobs: Any) -> Any:
        for row in range(tokens.shape[0]):
            for i, x in enumerate(tokens[row].tolist()):
                check(int(x), p[row, i].double(), neighbours[int(x)])
        return rule(tokens, q, p, neighbours=neighbours, **knobs)

    def check(x: int, p: Tensor, near: Tensor) -> None:
        """By definition, one token at a time: walk outwards while the bound allows."""
        knobs = rule.keywords
        bound = knobs["delta"] if "delta" in knobs else (knobs["lam"] - 1) * float(p[x])
        moved = 0.0
        for n in near[: knobs["k"]].tolist():
            if moved + float(p[n]) > bound:
                break
            moved += float(p[n])
        both = torch.stack([p, p])[None].float()
        p_hat, _ = aggregate(torch.tensor([[x]]), both, near[None, None, : knobs["k"]], torch.tensor(bound))
        assert float(p_hat) - float(p[x]) <= bound + 1e-6
        assert float(p_hat) == pytest.approx(float(p[x]) + moved, abs=1e-5)
        checked.tokens += 1
        checked.relaxed += moved > 1e-6

    verify.takes, verify.guarantee = ("neighbours",), "bounded"  # type: ignore[attr-defined]
    pipe.method.loop.verifier = verify
    for first in range(0, 64, 8):
        pipe(PROMPTS[first : first + 8], seed=first, do_sample=True, temperature=1.0, guidance_scale=2.0)
    assert checked.tokens > 5000
    assert checked.relaxed > 0
