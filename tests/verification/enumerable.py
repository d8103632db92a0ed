"""A target and a drafter small enough to enumerate, and the distribution of what a rule makes of them.

The tables of step i are [V**i, V]: the next token's distribution after each prefix of i tokens, so that nothing is
independent by accident. A rule is exact if its output, continued by plain sampling to N+1 tokens, has the target's
distribution over the V**(N+1) sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gtest import g_test
from torch import Tensor

from polyspec.verification import Verdict

ROWS = 200_000
FAILS = 1e-6  # below this p-value a rule is wrong


@dataclass
class Model:
    target: list[Tensor]  # N+1 tables
    draft: list[Tensor]  # N tables
    vocab: int

    @property
    def length(self) -> int:
        return len(self.draft)


def random_model(seed: int, vocab: int, length: int, sparse: bool = False) -> Model:
    """Random tables; `sparse` puts zeros into p and q, never the same row of tokens on purpose."""
    generator = torch.Generator().manual_seed(seed)

    def table(step: int) -> Tensor:
        logits = 1.3 * torch.randn(vocab**step, vocab, generator=generator)
        if sparse:
            logits[torch.rand(logits.shape, generator=generator) < 0.35] = -torch.inf
            logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)
        return logits.softmax(-1)

    return Model([table(i) for i in range(length + 1)], [table(i) for i in range(length)], vocab)


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Plain sampling by torch itself, independent of the code under test."""
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def draw_chain(model: Model, rows: int, generator: torch.Generator, one_hot: bool = False) -> tuple[Tensor, ...]:
    """(draft_tokens [R, N], draft_probs [R, N, V], target_probs [R, N+1, V]); one_hot: argmax drafts."""
    prefix = torch.zeros(rows, dtype=torch.long)
    tokens, q, p = [], [], [model.target[0][prefix]]
    for step in range(model.length):
        q.append(model.draft[step][prefix])
        tokens.append(q[-1].argmax(-1) if one_hot else draw(q[-1], generator))
        prefix = prefix * model.vocab + tokens[-1]
        p.append(model.target[step + 1][prefix])
    if not tokens:
        return torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0, model.vocab), torch.stack(p, 1)
    return torch.stack(tokens, 1), torch.stack(q, 1), torch.stack(p, 1)


def sequence_probs(model: Model) -> Tensor:
    """The target's distribution over all sequences of N+1 tokens."""
    joint = torch.ones(1, dtype=torch.float64)
    for table in model.target:
        joint = (joint[:, None] * table.double()).flatten()
    return joint


def complete(model: Model, kept: Tensor, accepted: Tensor, next_token: Tensor, generator: torch.Generator) -> Tensor:
    """Sequences [R] (as numbers in base V): accepted tokens of kept [R, >=N], the next token, then plain sampling."""
    prefix = torch.zeros_like(next_token)
    for step in range(model.length + 1):
        token = draw(model.target[step][prefix], generator)
        token = torch.where(accepted == step, next_token, token)
        if step < model.length:
            token = torch.where(accepted > step, kept[:, step], token)
        prefix = prefix * model.vocab + token
    return prefix


def chain_fit(
    rule: Callable[..., Verdict], model: Model, seed: int = 0, one_hot: bool = False, rows: int = ROWS, **knobs
) -> float:
    """p-value of a chain rule's output under the target's distribution."""
    generator = torch.Generator().manual_seed(seed)
    tokens, q, p = draw_chain(model, rows, generator, one_hot)
    verdict = rule(tokens, None if one_hot else q, p, generator=generator, **knobs)
    sequences = complete(model, tokens, verdict.accepted, verdict.next_token, generator)
    return g_test(torch.bincount(sequences, minlength=model.vocab ** (model.length + 1)), sequence_probs(model))


def step_fit(rule: Callable[..., Verdict], tokens: Tensor, q: Tensor, p: Tensor, seed: int = 99, **knobs) -> float:
    """p-value of a one-step rule's emitted token under p [V]; tokens [R, K] drawn by the caller
    (with another seed: the same random numbers twice would not be independent)."""
    generator = torch.Generator().manual_seed(seed)
    rows = tokens.shape[0]
    verdict = rule(p.expand(rows, -1), tokens, q.expand(rows, -1), generator=generator, **knobs)
    return g_test(torch.bincount(verdict.next_token, minlength=p.shape[0]), p)


def draw_tree(
    model: Model, parents: list[int], rows: int, generator: torch.Generator, replacement: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [R, M], node_q [R, M+1, V], target_probs [R, M+1, V]); siblings drawn in order from one table row.

    Without replacement, a sibling for which no token is left is missing (-1), and so is what hangs under it.
    """
    prefixes = [torch.zeros(rows, dtype=torch.long)]
    depths, missing = [0], [torch.zeros(rows, dtype=torch.bool)]
    left = [model.draft[0][prefixes[0]].clone()]
    node_q, p, tokens = [model.draft[0][prefixes[0]]], [model.target[0][prefixes[0]]], []
    for parent in parents:
        probs = left[parent + 1]
        empty = (probs.sum(-1) <= 0) | missing[parent + 1]
        token = draw(torch.where(empty[:, None], torch.ones_like(probs), probs), generator)
        if not replacement:
            probs.scatter_(-1, token[:, None], 0)
        depth = depths[parent + 1] + 1
        prefix = prefixes[parent + 1] * model.vocab + token
        depths.append(depth)
        prefixes.append(prefix)
        missing.append(empty)
        tokens.append(torch.where(empty, -1, token))
        p.append(model.target[depth][prefix])
        node_q.append(model.draft[depth][prefix] if depth < model.length else torch.full_like(p[-1], 1 / model.vocab))
        left.append(node_q[-1].clone())
    return torch.stack(tokens, 1), torch.stack(node_q, 1), torch.stack(p, 1)


def tree_fit(
    walk: Callable[..., tuple[Tensor, Tensor, Tensor]], model: Model, parents: list[int], seed: int, **knobs
) -> tuple[float, float]:
    """(p-value, mean accepted) of a rule `walk(tokens, parents, node_q, target_probs, replacement=, generator=)`."""
    generator = torch.Generator().manual_seed(seed)
    tokens, q, p = draw_tree(model, parents, ROWS, generator, knobs.get("replacement", False))
    path, accepted, next_token = walk(tokens, torch.tensor(parents), q, p, generator=generator, **knobs)
    kept = torch.where(path >= 0, tokens.gather(1, path.clamp(min=0)), 0)
    kept = torch.nn.functional.pad(kept, (0, max(0, model.length - kept.shape[1])))
    sequences = complete(model, kept, accepted, next_token, generator)
    counts = torch.bincount(sequences, minlength=model.vocab ** (model.length + 1))
    return g_test(counts, sequence_probs(model)), float(accepted.float().mean())
