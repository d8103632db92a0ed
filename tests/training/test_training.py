"""Training heads on a target's own text: they learn it, and every stage continues where it was interrupted."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, target
from transformers import PreTrainedModel

import polyspec
from polyspec.drafting.dflash import DFlashModel
from polyspec.drafting.eagle import EagleModel
from polyspec.drafting.heads import TokenLayers
from polyspec.drafting.medusa import MedusaModel
from polyspec.modalities.text.own_data import DataSource, mixed, opening
from polyspec.target import make_target
from polyspec.training import (
    Corpus,
    Schedule,
    compute_features,
    corpus_of,
    generate_corpus,
    load_corpus,
    read_prompts,
    train,
    train_head,
)
from polyspec.training.draft_model import tiny_llama
from polyspec.training.features import Features, JoinedFeatures
from polyspec.training.objectives import (
    DFlashObjective,
    DistilObjective,
    EagleObjective,
    MedusaObjective,
    Objective,
    random_positions,
)
from polyspec.training.trainer import collate

PROMPTS = [[5, 9, 3, 7], [8], [30, 2, 2, 41, 17, 6], [11, 12]]
LEARNERS: dict[str, tuple[str, Any, Objective, int]] = {
    "dflash": ("heads", lambda m: DFlashModel.for_target(m, block=5), DFlashObjective(anchors=16), 250),
    "ddtree": ("heads", lambda m: DFlashModel.for_target(m, block=5, recurrent=32), DFlashObjective(anchors=16), 250),
    "eagle": ("heads", EagleModel.for_target, EagleObjective(classification=1.0), 250),
    "medusa": ("heads", lambda m: MedusaModel.for_target(m, heads=4), MedusaObjective(), 250),
    "speculative_sampling": (
        "draft_model",
        lambda m: tiny_llama(m, layers=1, hidden_size=32),
        DistilObjective(),
        120,
    ),
}
"""Recipe: what it needs, how to make it, what trains it, for how many steps."""


@cache
def greedy_text() -> Corpus:
    """What the tiny target says after four prompts."""
    rows = [
        target("llama").generate(torch.tensor([p]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
        for p in PROMPTS
    ]
    return corpus_of([r[0].tolist() for r in rows], [len(p) for p in PROMPTS])


def layers_read(model: PreTrainedModel, objective: Objective) -> list[int]:
    return [*(getattr(model.config, "target_layers", None) or ()), *([2] if objective.last_hidden else [])]


def learn(recipe: str, folder: Path, **schedule: Any) -> tuple[PreTrainedModel, dict[str, float]]:
    _, make, objective, steps = LEARNERS[recipe]
    tgt, model = make_target(target("llama")), make(target("llama"))
    features = compute_features(tgt, greedy_text(), layers_read(model, objective), folder / "features")
    plan = Schedule(**{"steps": steps, "batch": 4, "learning_rate": 5e-3, "warmup": 10, **schedule})
    return model, train_head(model, tgt, greedy_text(), features, objective, plan, folder / recipe)


def acceptance(recipe: str, drafter: Any) -> float:
    kept = proposed = 0
    for prompt in PROMPTS:
        fast = polyspec.custom_generate(recipe, length=4, **{LEARNERS[recipe][0]: drafter})
        ids = torch.tensor([prompt])
        knobs = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
        out = target("llama").generate(ids, **knobs, custom_generate=fast)
        assert torch.equal(out, target("llama").generate(ids, **knobs))
        kept, proposed = kept + fast.stats.accepted_tokens, proposed + fast.stats.proposed_tokens
    return kept / proposed


@pytest.mark.parametrize("recipe", LEARNERS)
def test_heads_learn_their_target_and_the_output_stays_its_own(recipe: str, tmp_path: Path) -> None:
    before = acceptance(recipe, LEARNERS[recipe][1](target("llama")))
    learn(recipe, tmp_path)
    after = acceptance(recipe, str(tmp_path / recipe))
    assert before < 0.3
    assert after > 0.5


def test_distilling_from_some_rows_gives_about_the_gradient_of_all(tmp_path: Path) -> None:
    """Rows drawn stand for those not drawn; without that weight they would not, which is the wrong variant."""
    tgt, model = make_target(target("llama")), tiny_llama(target("llama"), layers=1, hidden_size=32)
    features = compute_features(tgt, greedy_text(), [2], tmp_path)
    rows = [{"tokens": greedy_text().row(i), "prompt": len(PROMPTS[i]), "hidden": features.row(i)} for i in range(4)]
    batch = collate(rows)
    batch["hidden"] = tuple(h.float() for h in batch["hidden"])
    table = model.get_output_embeddings()
    assert table is not None

    at = random_positions(batch["prompts"] - 1, batch["lengths"] - 1, 32)  # the same every time

    def gradient(objective: DistilObjective, times: int = 1) -> torch.Tensor:
        total = torch.zeros_like(table.weight)
        for _ in range(times):
            with patch("polyspec.training.objectives.random_positions", lambda *_: at):
                loss = objective(model, TokenLayers(tgt, None), batch)["loss"]
            (found,) = torch.autograd.grad(loss, [table.weight])
            total += found / times
        return total

    def unweighted(self: DistilObjective, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        kept, share = choose(self, *args)
        return kept, torch.zeros_like(share)

    torch.manual_seed(0)
    whole, size = gradient(DistilObjective()), len(table.weight)
    assert torch.allclose(gradient(DistilObjective(rows=size)), whole)
    some = DistilObjective(rows=size // 2)
    right = (gradient(some, 400) - whole).norm() / whole.norm()
    choose = DistilObjective.choose
    with patch.object(DistilObjective, "choose", unweighted):
        wrong = (gradient(some, 400) - whole).norm() / whole.norm()
    assert 1.5 * right < wrong, (right, wrong)  # a ratio of sums is biased where rows are few


@pytest.mark.parametrize("recipe", LEARNERS)
def test_losses_do_not_depend_on_padding(recipe: str, tmp_path: Path) -> None:
    """A row's loss is the same alone and beside a longer one. Positions are drawn at random, but alike."""
    _, make, objective, _ = LEARNERS[recipe]
    model, tgt = make(target("llama")), make_target(target("llama"))
    features = compute_features(tgt, greedy_text(), layers_read(model, objective), tmp_path)
    shared = TokenLayers(tgt, None)
    if isinstance(objective, EagleObjective):
        objective = EagleObjective(noise=0.0)

    def loss(index: int, longer_by: int) -> torch.Tensor:
        row = {"tokens": greedy_text().row(index), "prompt": len(PROMPTS[index]), "hidden": features.row(index)}
        batch = collate([row])
        batch["hidden"] = tuple(torch.nn.functional.pad(h.float(), (0, 0, 0, longer_by), value=9.0) for h in batch["hidden"])
        batch["tokens"] = torch.nn.functional.pad(batch["tokens"], (0, longer_by), value=7)
        torch.manual_seed(0)
        with torch.no_grad():
            return objective(model, shared, batch)["loss"]

    torch.testing.assert_close(loss(0, 0), loss(0, 11))


def test_an_interrupted_training_continues_to_the_same_weights(tmp_path: Path) -> None:
    whole, _ = learn("medusa", tmp_path / "whole", steps=12)
    learn("medusa", tmp_path / "parts", steps=12, checkpoint_minutes=0)
    saved = tmp_path / "parts" / "medusa" / "checkpoints"
    (only,) = saved.iterdir()
    assert only.name == "checkpoint-12"
    shutil.rmtree(tmp_path / "parts" / "medusa")

    class Interrupted(Exception):
        pass

    class Stopping(MedusaObjective):
        calls = 0

        def __call__(self, *args: Any) -> Any:
            self.calls += 1
            if self.calls > 7:
                raise Interrupted
            return super().__call__(*args)

    tgt, model = make_target(target("llama")), MedusaModel.for_target(target("llama"), heads=4)
    features = compute_features(tgt, greedy_text(), [2], tmp_path / "parts" / "features")
    plan = Schedule(steps=12, batch=4, learning_rate=5e-3, warmup=10, checkpoint_minutes=0)
    with pytest.raises(Interrupted):
        train_head(model, tgt, greedy_text(), features, Stopping(), plan, tmp_path / "parts" / "medusa")
    resumed, summary = learn("medusa", tmp_path / "parts", steps=12)
    assert summary["steps"] == 12
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_clock_ends_training_and_a_finished_one_is_not_repeated(tmp_path: Path) -> None:
    _, summary = learn("medusa", tmp_path, steps=None, minutes=0.01)
    again, second = learn("medusa", tmp_path, steps=None, minutes=0.01)
    assert 0 < summary["steps"] == second["steps"]
    stored = MedusaModel.from_pretrained(tmp_path / "medusa")
    torch.testing.assert_close(again.blocks.weight, stored.blocks.weight)


@pytest.mark.parametrize("knobs", [{}, {"steps": 0}, {"minutes": -1}, {"steps": 5, "batch": 0}])
def test_a_schedule_needs_an_end_and_sizes_above_zero(knobs: dict[str, Any]) -> None:
    with pytest.raises(polyspec.ConfigError):
        Schedule(**knobs)


def test_a_corpus_does_not_depend_on_where_its_making_was_interrupted(tmp_path: Path) -> None:
    model, knobs = target("llama"), {"batch": 3, "max_new_tokens": 9, "seed": 5}
    whole = generate_corpus(model, PROMPTS, tmp_path / "whole", tokens=100, **knobs)
    generate_corpus(model, PROMPTS, tmp_path / "parts", tokens=30, **knobs)
    parts = generate_corpus(model, PROMPTS, tmp_path / "parts", tokens=100, **knobs)
    assert np.array_equal(whole.tokens, parts.tokens)
    assert np.array_equal(load_corpus(tmp_path / "whole").starts, parts.starts)
    assert whole.generated() >= 100
    for i in range(len(whole)):
        assert whole.row(i)[: whole.prompts[i]].tolist() == PROMPTS[i % len(PROMPTS)]
    with pytest.raises(polyspec.CheckpointError, match="seed=5"):
        generate_corpus(model, PROMPTS, tmp_path / "whole", tokens=100, **{**knobs, "seed": 6})


def test_several_temperatures_are_used_in_turn_a_pass_over_the_prompts_each(tmp_path: Path) -> None:
    knobs = {"batch": 4, "max_new_tokens": 9, "tokens": 140}
    corpus = generate_corpus(target("llama"), PROMPTS, tmp_path, temperature=[0.0, 3.0], **knobs)
    likeliest = []
    for i in range(len(corpus)):
        prompt = corpus.row(i)[None, : corpus.prompts[i]]
        greedy = target("llama").generate(prompt, do_sample=False, max_new_tokens=9, pad_token_id=0)[0]
        ends = (greedy[len(prompt[0]) :] == 1).nonzero()
        until = len(prompt[0]) + int(ends[0]) + 1 if len(ends) else len(greedy)
        likeliest.append(torch.equal(corpus.row(i), greedy[:until]))
    assert len(corpus) >= 12
    assert all(likeliest[:4] + likeliest[8:12])
    assert not any(likeliest[4:8])
    with pytest.raises(polyspec.CheckpointError, match="temperature"):
        generate_corpus(target("llama"), PROMPTS, tmp_path, temperature=0.5, **knobs)


def test_a_chat_model_asks_itself_more_prompts(tmp_path: Path) -> None:
    model, words = target("llama"), tokenizer()
    words.chat_template = "{% for m in messages %}a {{ m.content }} b {% endfor %}c"
    source = DataSource.__new__(DataSource)
    source.model, source.tokenizer, source.texts = model, words, ["a b"]
    assert words.decode(opening(words)) == "a"
    asked = source.ask(3, tmp_path, batch=64, seed=0)
    assert len(set(asked)) == 3
    assert source.ask(2, tmp_path, batch=64, seed=0) == asked[:2]  # kept, not asked again
    words.chat_template = None
    with pytest.raises(polyspec.ConfigError, match="chat template"):
        source.ask(9, tmp_path, batch=64, seed=0)
    assert mixed(["a", "b"], ["1", "2", "3", "4"]) == ["a", "1", "2", "b", "3", "4"]


def test_a_trimmed_vocabulary_holds_the_most_frequent_generated_tokens() -> None:
    corpus = corpus_of([[9, 9, 9, 5, 3, 5], [9, 5, 3, 8]], [3, 1])
    assert corpus.generated() == 6
    assert corpus.frequent(2, vocab_size=20).tolist() == [3, 5]
    assert corpus.frequent(5, vocab_size=20).tolist() == [0, 1, 3, 5, 8]


def test_rows_of_joined_data_keep_their_hidden_states(tmp_path: Path) -> None:
    parts = []
    for name, rows in (("a", [[1, 2, 3], [4, 5]]), ("b", [[6, 7, 8, 9]])):
        corpus = corpus_of(rows, [1] * len(rows))
        data = np.stack([corpus.tokens, corpus.tokens], axis=1).astype(np.int16)
        (tmp_path / name).mkdir()
        data.tofile(tmp_path / name / "layer-01.bin")
        parts.append(Features(tmp_path / name, [1], 2, corpus))
    whole = JoinedFeatures(parts)
    assert [whole.corpus.row(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    for i in range(3):
        assert whole.row(i)[0][:, 0].view(torch.int16).tolist() == whole.corpus.row(i)[:-1].tolist()


def test_stored_hidden_states_are_those_of_the_plain_model(tmp_path: Path) -> None:
    tgt, corpus = make_target(target("llama")), greedy_text()
    grown_later = Corpus(corpus.tokens[: corpus.starts[3]], corpus.starts[:4], corpus.prompts[:3])
    compute_features(tgt, grown_later, [1], tmp_path, batch=2)
    features = compute_features(tgt, corpus, [1, 2], tmp_path, batch=2)
    for i in range(len(corpus)):
        expected = target("llama")(corpus.row(i)[None], output_hidden_states=True).hidden_states
        for layer, found in zip((1, 2), features.row(i), strict=True):
            torch.testing.assert_close(found, expected[layer][0, :-1].bfloat16())
    with pytest.raises(polyspec.CheckpointError, match="another corpus"):
        compute_features(tgt, corpus_of([[1, 2, 3]], [1]), [1], tmp_path)


@pytest.mark.parametrize("name", ["dflash", "medusa", "eagle", "draft_model"])
def test_every_train_configuration_composes(name: str) -> None:
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    with initialize_config_module("polyspec.conf", version_base="1.3"):
        config = compose("config", overrides=["task=train", "modality=text", f"train={name}", "train.minutes=3", "output=x"])
    assert config.train.output == "x"
    assert instantiate(config.train.schedule).minutes == 3
    head = instantiate(config.train.head)(target("llama"), vocabulary=None)
    assert instantiate(config.train.objective) is not None
    assert sum(p.numel() for p in head.parameters()) > 0


def test_the_whole_way_from_a_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    target("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    settings = {
        "name": "medusa",
        "target": str(folder),
        "output": str(tmp_path / "heads"),
        "dtype": "float32",
        "prompts": ["a b", "c"],
        "data": {"tokens": 40, "batch": 2, "max_new_tokens": 12},
        "vocabulary": 20,
        "head": {"_target_": "polyspec.drafting.medusa.MedusaModel.for_target", "_partial_": True, "heads": 2},
        "objective": {"_target_": "polyspec.training.objectives.MedusaObjective"},
        "schedule": {"_target_": "polyspec.training.Schedule", "steps": 3, "batch": 2},
    }
    assert train(settings) == tmp_path / "heads"
    heads = MedusaModel.from_pretrained(tmp_path / "heads")
    assert heads.config.vocab_size <= 20
    steps = {**settings["schedule"], "steps": 1, "learning_rate": 1e-9}  # go on from there, hardly a step
    train({**settings, "output": str(tmp_path / "more"), "start": str(tmp_path / "heads"), "schedule": steps})
    for a, b in zip(heads.parameters(), MedusaModel.from_pretrained(tmp_path / "more").parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert heads.config.even_embeddings
    heads.config.even_embeddings = False  # as heads trained before there was a choice
    heads.save_pretrained(tmp_path / "older")
    train({**settings, "output": str(tmp_path / "newer"), "start": str(tmp_path / "older"), "schedule": steps})
    assert not MedusaModel.from_pretrained(tmp_path / "newer").config.even_embeddings
    with pytest.raises(polyspec.CheckpointError, match="cannot start from"):
        train({**settings, "output": str(tmp_path / "wider"), "start": str(tmp_path / "heads"), "vocabulary": 12})
    block = {**settings["head"], "_target_": "polyspec.drafting.dflash.DFlashModel.for_target", "target_layers": [0, 1]}
    del block["heads"]
    settings |= {"objective": {"_target_": "polyspec.training.objectives.DFlashObjective"}, "head": block, "schedule": steps}
    train({**settings, "output": str(tmp_path / "block")})
    later = {**block, "recurrent": 4, "target_layers": [1, 2]}  # a state may be added to heads that had none
    train({**settings, "output": str(tmp_path / "state"), "start": str(tmp_path / "block"), "head": later})
    old, new = (DFlashModel.from_pretrained(tmp_path / name) for name in ("block", "state"))
    assert new.recurrence is not None and new.config.target_layers == [0, 1]
    for name, weight in old.state_dict().items():
        torch.testing.assert_close(new.state_dict()[name], weight, atol=1e-6, rtol=0)
    with pytest.raises(polyspec.CheckpointError, match="cannot start from"):  # but not taken away
        train({**settings, "output": str(tmp_path / "none"), "start": str(tmp_path / "state")})
    with pytest.raises(polyspec.ConfigError, match="modality"):
        train({**settings, "modality": "music"})
    both = {**settings["data"], "seed": 7, "also": [str(tmp_path / "block" / "data")]}
    train({**settings, "output": str(tmp_path / "both"), "data": both})
    with pytest.raises(polyspec.CheckpointError, match="lacks the hidden states of layers"):
        train({**settings, "output": str(tmp_path / "lack"), "data": {**both, "also": [str(tmp_path / "heads" / "data")]}})
    with pytest.raises(polyspec.CheckpointError, match="no head for image tokens"):
        train({**settings, "modality": "image"})
    with pytest.raises(polyspec.CheckpointError):
        train({**settings, "target": str(tmp_path / "nowhere")})


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "a": 2, "b": 3, "c": 4, "z": VOCAB - 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


def test_prompts_come_from_lists_files_or_the_sets_that_come_along(tmp_path: Path) -> None:
    assert read_prompts(["a", "b"]) == ["a", "b"]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n')
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["one"]
    assert len(read_prompts("train_chat")) > 100
    for bad in ("nothing.txt", "p.jsonl"):
        (tmp_path / "p.jsonl").write_text("not json\n")
        with pytest.raises(polyspec.InputError):
            read_prompts(str(tmp_path / bad))
    with pytest.raises(polyspec.ConfigError):
        read_prompts("no_such_set")
