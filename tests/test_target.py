"""What a target answers for drafted tokens is what the model answers in one plain forward over the same text."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, build, target
from torch import Tensor
from transformers import PreTrainedModel

from polyspec.attention import grouped
from polyspec.guidance import Guidance, guide_log_probs, guide_logits
from polyspec.target import Target, make_target, pack_rows
from polyspec.trees import Tree

DECODER_ONLY = [f for f in FAMILIES if f not in ("t5", "whisper")]
PARENTS = [-1, -1, 0, 0, 1, 2, 4]  # a tree of seven nodes under the committed token


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits `[L, V]` of one text `[L]`."""
    return model(tokens[None]).logits[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def ragged() -> tuple[Tensor, Tensor, list[int]]:
    """Three prompts of 12, 7 and 1 tokens, padded on the left."""
    tokens, pads = text(3, 12), [0, 5, 11]
    mask = (torch.arange(12) >= torch.tensor(pads)[:, None]).long()
    return tokens.masked_fill(mask == 0, 0), mask, pads


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_drafted_tokens_are_scored_as_in_one_plain_forward(family: str) -> None:
    model = target(family)
    tokens, mask, pads = ragged()
    wrapped = make_target(model)
    wrapped.prefill(tokens, mask, capacity=16)
    rows = [tokens[b, p:] for b, p in enumerate(pads)]
    for round_, accepted in enumerate(([3, 0, 1], [0, 4, 2], [4, 4, 4], [2, 1, 0])):
        drafts = text(3, 4, seed=round_ + 1)
        step = torch.cat([torch.stack([r[-1:] for r in rows]), drafts], dim=1)
        logits = wrapped.forward(step).logits
        for b, row in enumerate(rows):
            assert_close(logits[b], plain(model, torch.cat([row, drafts[b]]))[-5:])
        # each row accepts some drafts and gets one more token
        following = text(1, 1, seed=9)[0]
        rows = [torch.cat([r, drafts[b, :n], following]) for b, (r, n) in enumerate(zip(rows, accepted, strict=True))]
        wrapped.rollback([len(r) - 1 for r in rows])
    assert wrapped.cache_lengths == [len(r) - 1 for r in rows]


def path_to(node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = PARENTS[node]
    return path[::-1]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_every_node_of_a_tree_is_scored_as_the_end_of_its_own_path(family: str, per_row: bool) -> None:
    model = target(family)
    tokens, mask, pads = ragged()
    wrapped = make_target(model)
    wrapped.prefill(tokens, mask, capacity=16)
    drafts = text(3, len(PARENTS), seed=5)
    parents = torch.tensor(PARENTS)
    tree = Tree(parents.expand(3, -1).contiguous() if per_row else parents)
    logits = wrapped.forward(torch.cat([tokens[:, -1:], drafts], dim=1), tree).logits
    for b, pad in enumerate(pads):
        assert_close(logits[b, 0], plain(model, tokens[b, pad:])[-1])
        for node in range(len(PARENTS)):
            row = torch.cat([tokens[b, pad:], drafts[b, path_to(node)]])
            assert_close(logits[b, node + 1], plain(model, row)[-1])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_kept_path_is_as_good_as_if_it_had_been_a_chain(family: str) -> None:
    model = target(family)
    tokens, mask, pads = ragged()
    wrapped = make_target(model)
    wrapped.prefill(tokens, mask, capacity=16)
    drafts = text(3, len(PARENTS), seed=5)
    wrapped.forward(torch.cat([tokens[:, -1:], drafts], dim=1), Tree(torch.tensor(PARENTS)))
    nodes = [path_to(6), path_to(5), path_to(3)]  # 1-4-6, 0-2-5 and 0-3
    longest = max(map(len, nodes))
    wrapped.keep_path(torch.tensor([[0, *(n + 1 for n in p), *[0] * (longest - len(p))] for p in nodes]))
    rows = [torch.cat([tokens[b, pad:], drafts[b, nodes[b]]]) for b, pad in enumerate(pads)]
    wrapped.rollback([len(r) for r in rows])
    following = text(3, 3, seed=6)
    logits = wrapped.forward(following).logits
    for b, row in enumerate(rows):
        assert_close(logits[b], plain(model, torch.cat([row, following[b]]))[-3:])


@pytest.mark.parametrize("combine", [guide_log_probs, guide_logits])
def test_guidance_runs_each_rows_own_negative_prompt_beside_it(combine: object) -> None:
    model = target("llama")
    tokens, mask, pads = ragged()
    negative, cut = text(3, 6, seed=8), [0, 3, 5]
    negative_mask = (torch.arange(6) >= torch.tensor(cut)[:, None]).long()
    wrapped = make_target(model, Guidance(1.5, negative, negative_mask, combine))  # type: ignore[arg-type]
    wrapped.prefill(tokens, mask, capacity=16)
    rows = [(tokens[b, p:], negative[b, c:]) for b, (p, c) in enumerate(zip(pads, cut, strict=True))]
    last = tokens[:, -1:]
    for round_, accepted in enumerate(([2, 0, 3], [0, 3, 1], [1, 1, 1])):
        drafts = text(3, 3, seed=round_)
        logits = wrapped.forward(torch.cat([last, drafts], dim=1)).logits
        for b, (yes, no) in enumerate(rows):
            both = [plain(model, torch.cat([r, drafts[b]]))[-4:] for r in (yes, no)]
            assert_close(logits[b], combine(*both, 1.5))  # type: ignore[operator]
        new = [torch.cat([drafts[b, :n], text(1, 1, seed=9)[0]]) for b, n in enumerate(accepted)]
        rows = [(torch.cat([yes, n]), torch.cat([no, n])) for (yes, no), n in zip(rows, new, strict=True)]
        last = torch.stack([n[-1:] for n in new])
        wrapped.rollback([len(yes) - 1 for yes, _ in rows])


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_eager_attention_gives_what_sdpa_gives(family: str) -> None:
    tokens, mask, _ = ragged()
    outputs = []
    for attention in ("sdpa", "eager"):
        model = build(family)
        model.config._attn_implementation_internal = attention
        wrapped = make_target(model)
        wrapped.prefill(tokens, mask, capacity=16)
        outputs.append(wrapped.forward(torch.cat([tokens[:, -1:], text(3, 5, seed=2)], dim=1)).logits)
    assert_close(*outputs)


def test_grouped_attention_is_used_during_a_call_only_and_changes_nothing() -> None:
    model = target("llama")
    tokens = text(2, 7)
    with torch.no_grad():
        expected = model(tokens).logits
        with grouped(model.config):
            assert_close(model(tokens).logits, expected)
    assert model.config._attn_implementation == "sdpa"


def test_hidden_states_of_the_layers_asked_for_come_back() -> None:
    model = target("llama")
    tokens, mask, pads = ragged()
    wrapped = Target(model, hidden_layers=(1, 2))
    prompt = wrapped.prefill(tokens, mask, capacity=16)
    output = wrapped.forward(tokens[:, -1:])
    assert prompt is not None
    for b, pad in enumerate(pads):
        with torch.no_grad():
            expected = model(tokens[b : b + 1, pad:], output_hidden_states=True).hidden_states
        for ours, after, layer in zip(prompt.hidden, output.hidden, (1, 2), strict=True):
            assert_close(ours[b, : 12 - pad - 1], expected[layer][0, :-1])
            assert_close(after[b], expected[layer][0, -1:])


def test_packing_moves_real_tokens_to_the_front() -> None:
    tokens, mask, pads = ragged()
    packed, counts = pack_rows(tokens, mask)
    assert counts == [12, 7, 1]
    for b, pad in enumerate(pads):
        assert packed[b, : counts[b]].tolist() == tokens[b, pad:].tolist()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_rows_that_stopped_leave_the_batch_and_the_others_are_scored_as_before(family: str, guided: bool) -> None:
    model = target(family)
    tokens, mask, _ = ragged()
    drafts, parents = text(3, len(PARENTS), seed=5), torch.tensor(PARENTS).expand(3, -1).contiguous()
    answers, widths = [], []
    for running in (None, [False, True, True], [False, True, False]):
        guidance = Guidance(1.5, text(3, 4, seed=7)) if guided else None
        wrapped = make_target(model, guidance, hidden_layers=(0, 1))
        wrapped.prefill(tokens, mask, capacity=24)
        wrapped.rollback(wrapped.cache_lengths[:3], running)
        tree = wrapped.forward(torch.cat([tokens[:, -1:], drafts], dim=1), Tree(parents))
        wrapped.keep_path(torch.tensor([[0, 1], [0, 2], [0, 1]]))
        wrapped.rollback([n + 2 for n in wrapped.cache_lengths[:3]], running)
        chain = wrapped.forward(drafts[:, :3])
        assert wrapped.cache is not None and len(wrapped.cache_lengths) == wrapped.streams
        answers.append([x[1] for x in (tree.logits, chain.logits, *chain.hidden)])
        widths.append(wrapped.cache.layers[0].keys.shape[0])
    assert widths == [n * (2 if guided else 1) for n in (3, 2, 1)]
    for answer in answers[1:]:
        for ours, theirs in zip(answer, answers[0], strict=True):
            assert_close(ours, theirs)


def test_rows_that_stopped_stay_if_the_cache_is_asked_for() -> None:
    tokens, mask, _ = ragged()
    wrapped = make_target(target("llama"))
    wrapped.keep_finished = True
    wrapped.prefill(tokens, mask, capacity=16)
    wrapped.rollback(wrapped.cache_lengths, [False, True, True])
    assert wrapped.past([0, 5, 11]).layers[0].keys.shape[0] == 3
