"""Retrieval pools: what they count and forget, their file, and drafts from them under both kinds of check."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, target
from torch import Tensor

import polyspec
from polyspec.drafting import pools as module
from polyspec.drafting.pools import DEPTH, Drafted, Pool, Pools
from polyspec.verification import walk_topk_threshold

NEW = 24


def counts(pool: Pool, *path: int) -> tuple[float, float] | None:
    node = pool.find(path)
    return None if node is None else (node.prompt, node.output)


def filled(texts: list[list[int]], **sizes: int) -> Pool:
    return Pools.from_tokens({"a": texts}, **sizes)["a"]


# -- the pool --------------------------------------------------------------------------------------------------------


def test_every_suffix_is_counted_to_the_depth_however_the_text_arrives() -> None:
    text = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    whole, piecewise = filled([text]), Pool()
    piecewise.begin(())
    for end in (1, 2, 9, 30, 60):
        new = end - (0, 1, 2, 9, 30)[(1, 2, 9, 30, 60).index(end)]
        piecewise.extend(text[:end], new, "output")
    for pool in (whole, piecewise):
        for start in range(60):
            for length in range(1, min(DEPTH, 60 - start) + 1):
                path = text[start : start + length]
                times = sum(text[i : i + length] == path for i in range(61 - length))
                assert counts(pool, *path) == (0, times)
        assert counts(pool, *text[: DEPTH + 1]) is None
    distinct = {tuple(text[i : i + n]) for n in range(1, DEPTH + 1) for i in range(61 - n)}
    assert whole.size == piecewise.size == len(distinct) == len(list(whole.nodes()))


def test_prompts_and_outputs_are_counted_apart() -> None:
    pool = Pool()
    pool.begin([5, 6], times=3)
    pool.extend([5, 6, 7, 5], 2, "output")
    assert counts(pool, 5, 6) == (3, 0)
    assert counts(pool, 5) == (3, 1)
    assert counts(pool, 5, 6, 7) == counts(pool, 7, 5) == (0, 1)

    def drafted(weight: float) -> list[int]:
        found = Drafted()
        found.grow(pool.root, 3, 1, weight)
        return found.tokens

    assert drafted(1.0) == [5, 6, 7]
    assert drafted(0.1) == [5, 7, 6]
    assert drafted(0.0) == [7, 5] or drafted(0.0) == [5, 7]


def test_counts_are_halved_and_what_is_rare_is_forgotten() -> None:
    pool = filled([[1, 2, 3]] * 5 + [[1, 9]] * 2, period=8)
    assert counts(pool, 1) == (0, 7)
    pool.begin([4])  # the eighth text
    assert counts(pool, 1) == (0, 3.5)
    assert counts(pool, 1, 2, 3) == (0, 2.5)
    assert counts(pool, 1, 9) == (0, 1)
    pool.halve()
    assert counts(pool, 1, 9) is None and counts(pool, 4) is None
    assert pool.size == len(list(pool.nodes())) == 6  # 1, 1-2, 1-2-3, 2, 2-3, 3


def test_beyond_its_limit_a_pool_keeps_what_is_frequent_and_recent() -> None:
    pool = filled([[1, 2, 3]] * 3, limit=40)
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        text = torch.randint(10, 10**6, (4,), generator=generator).tolist()
        pool.begin(())
        pool.extend(text, 4, "output")
        assert pool.size == len(list(pool.nodes())) <= 40
        assert counts(pool, 1, 2, 3) == (0, 3), number
        assert counts(pool, *text) == (0, 1)


def test_a_path_that_was_evicted_under_a_running_text_does_no_harm() -> None:
    pool = Pool(limit=8)
    pool.begin(())
    tokens: list[int] = []
    for token in range(30):
        tokens.append(token)
        pool.extend(tokens, 1, "output")
        assert pool.size == len(list(pool.nodes())) <= 8


# -- what is drafted ---------------------------------------------------------------------------------------------------


def test_the_draft_holds_the_most_frequent_paths_first() -> None:
    pool = filled([[7, 1, 2], [7, 1, 3], [7, 1, 3], [7, 4]])
    below = pool.find([7])
    assert below is not None
    found = Drafted()
    found.grow(below, 4, 12, 0.5)
    assert (found.tokens, found.parents) == ([1, 3, 4, 2], [-1, 0, -1, 0])
    shallow = Drafted()
    shallow.grow(below, 9, 1, 0.5)
    assert shallow.tokens == [1, 4]


def test_longer_suffixes_come_first_and_shorter_ones_add_what_they_know_beyond() -> None:
    pool = filled([[1, 2, 8, 8], [2, 9], [2, 9], [2, 9]])
    found = Drafted()
    for suffix in ([1, 2], [2]):
        below = pool.find(suffix)
        assert below is not None
        found.grow(below, 3, 12, 0.5)
    assert (found.tokens, found.parents) == ([8, 8, 9], [-1, 0, -1])


# -- the file ----------------------------------------------------------------------------------------------------------


def contents(pools: Pools) -> dict[str, Any]:
    def below(node: Any) -> Any:
        return {token: (n.prompt, n.output, n.seen, below(n)) for token, n in node.children.items()}

    return {g: (p.texts, p.size, p.highest, below(p.root)) for g, p in pools.groups.items()}


def test_pools_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    pools = Pools.from_tokens({"books": [[1, 2, 3, 1, 2]], "söme films": [[4, 5], [4, 6]], "none": []})
    pools["books"].begin([7, 8])
    pools["empty"].begin(())
    pools.save(tmp_path / "pools.safetensors")
    assert contents(Pools.load(tmp_path / "pools.safetensors")) == contents(pools)
    Pools().save(tmp_path / "pools.safetensors")
    assert contents(Pools.load(tmp_path / "pools.safetensors")) == {}
    assert [f.name for f in tmp_path.iterdir()] == ["pools.safetensors"]


def test_a_smaller_limit_evicts_on_loading(tmp_path: Path) -> None:
    Pools.from_tokens({"a": [list(range(30))]}).save(tmp_path / "pools")
    pool = Pools.load(tmp_path / "pools", limit=20)["a"]
    assert pool.size == len(list(pool.nodes())) <= 20


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    path = tmp_path / "pools.safetensors"
    Pools.from_tokens({"a": [[1, 2, 3]]}).save(path)
    whole = path.read_bytes()
    damaged = [b"", b"no tensors here", whole[:-8], whole[: len(whole) // 2]]
    for number, content in enumerate(damaged):
        (tmp_path / f"{number}").write_bytes(content)
    save_file({"0.nodes": np.zeros((1, 3), dtype=np.int64)}, tmp_path / "4")  # another kind of file
    about = {"retrieval_pools": '[{"group": "a", "texts": 1}]'}
    nodes, one = np.array([[5, 0, 1], [5, -1, 1]]), np.ones((2, 2))
    save_file({"0.nodes": nodes, "0.counts": one}, tmp_path / "5", metadata=about)  # a child before its parent
    save_file({"0.nodes": nodes[1:], "0.counts": -one[1:]}, tmp_path / "6", metadata=about)
    for name in [*map(str, range(7)), "missing"]:
        with pytest.raises(polyspec.CheckpointError, match="cannot read the pools"):
            Pools.load(tmp_path / name)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pools.safetensors"
    pools = Pools.from_tokens({"a": [[1, 2, 3]]})
    pools.save(path)
    before = path.read_bytes()

    def half(tensors: Any, name: Path, **_: Any) -> None:
        Path(name).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(polyspec.InputError, match="No space left"):
        pools.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    with pytest.raises(polyspec.InputError, match="cannot write"):
        pools.save(tmp_path / "nowhere" / "pools")


# -- decoding ----------------------------------------------------------------------------------------------------------


@cache
def ragged() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :7] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def rows(count: int) -> dict[str, Tensor]:
    return {name: value[:count] for name, value in ragged().items()}


@cache
def plain(family: str, count: int) -> Tensor:
    return target(family).generate(**rows(count), do_sample=False, max_new_tokens=NEW)


def generate(
    recipe: str, count: int = 4, family: str = "llama", fast: polyspec.CustomGenerate | None = None, **knobs: Any
) -> tuple[Tensor, polyspec.DecodingStats]:
    fast = fast or polyspec.custom_generate(recipe, **{"pools": {}, "length": 6, **knobs})
    out = target(family).generate(**rows(count), do_sample=False, max_new_tokens=NEW, custom_generate=fast)
    return out, fast.stats


def own_texts(family: str = "llama") -> dict[str, list[list[int]]]:
    """What the model writes, half of it with a token changed here and there."""
    texts = plain(family, 4).tolist()
    return {"default": texts[:2] + [[t if i % 5 else (t + 1) % VOCAB for i, t in enumerate(text)] for text in texts[2:]]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5"])
@pytest.mark.parametrize("count", [1, 4])
def test_with_k_1_greedy_tokens_are_those_of_generate(family: str, count: int) -> None:
    expected = plain(family, count)
    for pools in ({}, own_texts(family), {"default": torch.randint(2, VOCAB, (30, 20)).tolist()}):
        out, stats = generate("dare", count, family, pools=pools, k=1)
        assert torch.equal(out, expected)
        assert stats.guarantee == "heuristic"
    assert generate("dare", count, family, pools=own_texts(family), k=1)[1].accepted_tokens > 0


def test_relaxed_output_keeps_allowed_tokens_only_and_is_not_always_the_plain_one() -> None:
    model, changed = target("llama"), False
    for k, threshold in ((2, 0.1), (4, 0.02)):
        out, _ = generate("dare", 1, pools=own_texts(), k=k, threshold=threshold)
        probs = model(out).logits[0].softmax(-1)
        for position in range(9, out.shape[1]):
            p, token = probs[position - 1], int(out[0, position])
            best = p.topk(k).indices.tolist()
            assert token == best[0] or (token in best and p[token] > threshold)
        changed |= not torch.equal(out, plain("llama", 1))
    wrong = torch.randint(2, VOCAB, (300, 12)).tolist()
    out, _ = generate("dare", 4, pools={"default": wrong}, k=30, threshold=0.0, shortest=1)
    assert changed or not torch.equal(out, plain("llama", 4))


def test_a_walk_that_relaxes_where_k_is_1_fails_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = polyspec.custom_generate("dare", pools={"default": torch.randint(2, VOCAB, (300, 12)).tolist()}, k=1, length=6)

    def lax(*given: Tensor, **knobs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return walk_topk_threshold(*given, k=20, threshold=0.0, depth=knobs["depth"])

    fast.method.loop.walk = lax
    assert not torch.equal(generate("dare", fast=fast)[0], plain("llama", 4))


@pytest.mark.parametrize("recipe", ["dare", "retrieval_pool"])
def test_a_warm_pool_accepts_more_than_a_cold_one(recipe: str) -> None:
    knobs = {"k": 1} if recipe == "dare" else {}
    fast = polyspec.custom_generate(recipe, pools={}, length=6, **knobs)
    first, cold = generate(recipe, fast=fast)
    second, warm = generate(recipe, fast=fast)
    assert torch.equal(first, second)
    assert warm.accepted_tokens > cold.accepted_tokens and warm.target_calls < cold.target_calls
    assert warm.tokens_per_call > 3


def test_groups_do_not_see_each_other_and_rows_may_be_of_several() -> None:
    pools = Pools.from_tokens({"a": plain("llama", 1).tolist()})

    def calls(group: str | list[str], count: int) -> int:
        out, stats = generate("dare", count, pools=pools, group=group, learn=False, k=1, shortest=3)
        assert torch.equal(out, plain("llama", count))
        return stats.target_calls

    assert calls("a", 1) < calls("b", 1)
    assert calls(["b", "a", "a", "a"], 4) >= calls("b", 1)
    assert list(pools.groups) == ["a"], "nothing is learnt"
    generate("dare", 4, pools=pools, group=["a", "b", "b", "c"])
    assert set(pools.groups) == {"a", "b", "c"}
    with pytest.raises(polyspec.InputError, match="group has 2 entries for a batch of 4"):
        generate("dare", 4, group=["a", "b"])


def test_what_was_written_is_in_the_pool_as_prompt_and_as_output() -> None:
    pools = Pools()
    out, _ = generate("dare", 1, pools=pools, k=1)
    pool, text = pools["default"], out[0].tolist()
    for i in range(len(text)):
        prompts = sum(t == text[i] for t in text[:9])
        outputs = sum(t == text[i] for t in text[9:])
        assert counts(pool, text[i]) == (prompts, outputs)
    assert counts(pool, *text[-DEPTH:]) is not None
    assert pool.texts == 1


def test_a_file_is_made_by_the_first_run_and_read_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "pools.safetensors"
    with pytest.raises(polyspec.CheckpointError, match="cannot read the pools"):
        generate("dare", pools=path, learn=False)
    cold = generate("dare", pools=str(path), k=1)[1]
    learnt = path.read_bytes()
    out, warm = generate("dare", pools=path, learn=False, k=1)
    assert torch.equal(out, plain("llama", 4))
    assert warm.target_calls < cold.target_calls
    assert path.read_bytes() == learnt, "pools that are only read stay as they are"
    path.write_bytes(learnt[:100])
    with pytest.raises(polyspec.CheckpointError, match="cannot read the pools"):
        generate("dare", pools=path)


def test_the_exact_recipe_draws_what_the_plain_loop_draws() -> None:
    """Whatever the pool holds, tokens are those of the same noise."""
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW}
    outputs = [
        target("llama").generate(**rows(4), **options, custom_generate=polyspec.custom_generate(name, seed=1, **knobs))
        for name, knobs in (("autoregressive", {}), ("retrieval_pool", {"pools": own_texts(), "length": 6}))
    ]
    assert torch.equal(*outputs)


def test_bad_knobs_are_named(tmp_path: Path) -> None:
    for knobs in ({"shortest": 9}, {"nodes": 0}, {"prompt_weight": -1}, {"limit": 0}, {"period": 1.5}, {"longest": True}):
        with pytest.raises(polyspec.ConfigError, match=next(iter(knobs))):
            generate("dare", **knobs)
    with pytest.raises(polyspec.ConfigError, match="needs pools"):
        polyspec.custom_generate("dare")
    with pytest.raises(polyspec.InputError, match="another tokenizer"):
        generate("dare", pools={"a": [[1, VOCAB]]})
    with pytest.raises(polyspec.InputError, match="input_ids"):
        generate("dare", pools={"a": ["some text"]})
    with pytest.raises(polyspec.InputError, match="pools must be"):
        generate("dare", pools=3)
