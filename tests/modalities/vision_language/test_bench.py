"""The vision-language bench: questions meet pictures, kinds and batch sizes are measured apart, figures are files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from tiny_llava import llava, picture, save_llava
from tiny_models import llama, sharpen

import polyspec
from polyspec.bench.run import batches_of, run
from polyspec.modalities.vision_language.evaluate import Example, assistant, bench_prompts, matches


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A target, a drafter, questions, a folder of pictures."""
    save_llava(tmp_path / "llava")
    torch.manual_seed(3)
    drafter = sharpen(llama(vocab=len(llava()[1].tokenizer), hidden=16), 6.0)
    drafter.lm_head.weight.data[3] = 0  # a placeholder among its first drafts is more than transformers can take
    drafter.save_pretrained(tmp_path / "drafter")
    rows = [
        {"prompt": "what is in the picture ?", "category": "about the image"},
        {"prompt": "a green tree", "category": "beside the image"},
        {"prompt": "give keywords", "category": "about the image", "image": "2.png"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def prompts(data: Path) -> dict[str, Any]:
    return {"questions": str(data / "questions.jsonl"), "pictures": str(data / "pictures")}


def test_questions_go_round_the_pictures_and_own_pictures_are_theirs(data: Path) -> None:
    found = bench_prompts(prompts(data))
    assert [q.prompt for q in found] == [
        "what is in the picture ?",
        "a green tree",
        "give keywords",
        "what is in the picture ?",
    ]
    assert [list(q.image.getdata()) for q in found] == [list(picture(k).getdata()) for k in (0, 1, 2, 3)]
    assert [[q.kind for q in b] for b in batches_of(found, 2)] == [
        ["about the image"] * 2,
        ["about the image"],
        ["beside the image"],
    ]
    with pytest.raises(polyspec.ConfigError, match="pictures"):
        bench_prompts({"questions": str(data / "questions.jsonl"), "pictures": None})
    with pytest.raises(polyspec.InputError, match="no picture"):
        bench_prompts({"questions": str(data / "questions.jsonl"), "pictures": str(data)})


def test_the_bench_reports_batch_sizes_and_kinds_of_questions_apart(data: Path) -> None:
    with initialize_config_module("polyspec.conf", version_base="1.3"):
        config = compose(
            "config",
            overrides=[
                "task=bench", "modality=vision_language", f"target={data / 'llava'}", "device=cpu", "dtype=float32",
                f"bench.prompts.questions={data / 'questions.jsonl'}", f"bench.prompts.pictures={data / 'pictures'}",
                f"bench.draft_model={data / 'drafter'}", f"bench.output={data / 'out'}", "bench.batch=[1,2]",
                "bench.arguments.max_new_tokens=8",
            ],
        )  # fmt: skip
    run(config)
    report = json.loads((data / "out" / "results.json").read_text())
    kinds = ["", ", about the image", ", beside the image"]
    assert [s["name"] for s in report["sections"]] == [f"batch {n}{kind}" for n in (1, 2) for kind in kinds]
    labels = [r["label"] for r in report["results"]]
    single = "ibed views=C, captioner=target, length=4"
    assert labels[:2] == ["transformers", "plain loop"] and {
        "transformers assistant_model",
        "tabed views=TC, captioner=target, length=4",
        single,
    } < set(labels)
    everything, about, beside = ({r["label"]: r for r in s["results"]} for s in report["sections"][:3])
    for label, r in everything.items():
        assert len(r["runs"]) == 4 == len(about[label]["runs"]) + len(beside[label]["runs"])
        assert r["same_as_plain_loop"] in (None, 1.0) and r["speed_up"] > 0
    r = everything[single]
    ratio = r["runs"][0]["draft_ratio"]
    calls = [sum(run[k] for run in r["runs"]) for k in ("draft_calls", "target_calls")]
    assert r["mbsu"] == pytest.approx(r["tokens_per_call"] / (1 + ratio * calls[0] / calls[1])) and ratio > 0
    assert r["accepted_by_position"] and r["same_as_plain_loop"] == 1.0
    for name in ("results.png", "positions.png"):
        assert (data / "out" / name).stat().st_size > 1000


def test_the_assistant_of_transformers_is_the_same_drafter_and_left_as_it_was(data: Path) -> None:
    pipe = polyspec.pipeline("vision_language", target=str(data / "llava"), recipe="autoregressive", dtype="float32")
    with assistant(pipe, str(data / "drafter")) as model:
        inputs = pipe.encode(["a red heart"], [[picture()]])
        given = {"max_new_tokens": 8, "do_sample": False}
        assisted = pipe.model.generate(**inputs, assistant_model=model, **given)
        assert torch.equal(assisted, pipe.model.generate(**inputs, **given))
    assert "generate" not in vars(model)
    with pytest.raises(polyspec.ConfigError, match=r"bench\.draft_model"), assistant(pipe, None):
        pass


def test_titles_count_only_where_there_is_one() -> None:
    class Says:
        def __call__(self, prompts: list[str], images: Any, **_: Any) -> Any:
            return polyspec.outputs.Result(["a red heart" if images else "a tree"] * len(prompts), None)

    examples = [
        Example(picture(), "red heart", ()),
        Example(picture(), "", ("heart", "love")),
        Example(picture(), "star", ("red",)),
    ]
    assert matches(Says(), examples, "what?") == {"exact": 0.5, "partial": 1.0}
    assert matches(Says(), examples, "what?", seen=False) == {"exact": 0.0, "partial": 0.0}
