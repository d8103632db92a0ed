"""Lookahead decoding: Jacobi trajectories fill a pool of n-grams, and the pool drafts for the target, in one forward.

Break the Sequential Dependency of LLM Inference Using Lookahead Decoding, 2402.02057 (ICML 2024). Guarantee: exact
(greedy: token-identical; sampled: the target's own draw at each node decides).

The window holds N−1 levels of W tokens. Level 0 is a chain behind the last committed token; token j of level i hangs
under token j of level i−1, so the whole window is a tree, and so are the pool's candidates beside it. What the target
puts behind column j's last level completes an N-gram, which enters the pool under the column's first token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.errors import ConfigError, UnsupportedModelError
from polyspec.lengths import positive
from polyspec.trees import Tree
from polyspec.verification import Verdict, walk_deterministic


class Pool:
    """The latest `size` continuations of each token, a row's own."""

    def __init__(self, size: int):
        self.size = size
        self.grams: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, gram: tuple[int, ...]) -> None:
        """Take in `(first, *rest)`; the oldest continuation of `first` leaves when there are too many."""
        known = self.grams.setdefault(gram[0], {})
        known.pop(gram[1:], None)
        known[gram[1:]] = None
        if len(known) > self.size:
            del known[next(iter(known))]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """Continuations of `token`, latest first."""
        return list(self.grams.get(token, ()))[::-1]


def window_tree(window: int, levels: int, candidates: int) -> Tree:
    """The shape of a round's draft: the window, level by level, then the candidates, one chain each."""
    parents = list(range(-1, window - 1))  # level 0
    for level in range(1, levels):
        parents += [(level - 1) * window + j for j in range(window)]
    for _ in range(candidates):
        start = len(parents)
        parents += [-1, *range(start, start + levels - 1)]
    return Tree(torch.tensor(parents, dtype=torch.long))


class Lookahead:
    """window: W. ngram: N ≥ 2. candidates: G, the most n-grams of the pool tried in a round."""

    def __init__(self, window: int = 5, ngram: int = 3, candidates: int = 5):
        self.window, self.candidates = positive("window", window), positive("candidates", candidates)
        if positive("ngram", ngram) < 2:
            raise ConfigError("ngram must be ≥ 2: a token and at least one that follows it")
        self.levels = ngram - 1

    def run(self, context: Context, drafter: Drafter) -> None:
        """Generate until every row of `context.sequences` has stopped."""
        target, sequences, stats = context.target, context.sequences, context.stats
        if target.lockstep:
            raise UnsupportedModelError(
                f"{type(target.model).__name__} takes no position ids, so the window's columns cannot share positions; "
                "use a chain recipe"
            )
        pools = [Pool(self.candidates) for _ in range(sequences.batch)]
        levels = self.first_window(sequences.history, sequences.device)
        trees = {g: window_tree(self.window, self.levels, g).to(sequences.device) for g in range(self.candidates + 1)}
        while not sequences.finished:
            with stats.timed("draft"):
                tried = [p.after(h[-1])[: self.candidates] for p, h in zip(pools, sequences.history, strict=True)]
                draft = self.draft(levels, tried, trees)
                tree = draft.tree
                assert tree is not None
            with stats.timed("target"):
                output = target.forward(torch.cat([sequences.tail(1), draft.tokens], dim=1), tree)
            with stats.timed("verify"):
                scores = context.processing.scores(output.logits, sequences, draft.tokens, tree)
                drawn = context.draws.draw(scores, sequences.positions(1) + tree.depth)
                path, accepted, token = walk_deterministic(draft.tokens, tree.parents, drawn, depth=tree.height)
                drafted = draft.tokens.gather(1, path.clamp(min=0))
                # the window moves up a level; its last level is what the target puts behind each column
                ends = slice((self.levels - 1) * self.window + 1, self.levels * self.window + 1)
                # where a processor rules out every token behind a wrong guess, nothing is drawn (-1): any token will do
                grams = torch.cat([levels, drawn[:, None, ends].clamp(min=0)], dim=1)
                levels = grams[:, 1:]
                # offsets of the committed token and of the walked nodes among the tokens just scored
                kept = functional.pad(path + 1, (1, 0)).clamp(min=0)
                best = scores.amax(-1).gather(1, kept)
                gained = sequences.commit(drafted, Verdict(accepted, token), best, also=grams.flatten(1))
                target.keep_path(kept[:, : max(gained)])
                target.rollback(sequences.cached, sequences.running)
            with stats.timed("draft"):
                for pool, flat in zip(pools, sequences.also, strict=True):
                    for column in range(self.window):
                        pool.add(tuple(flat[column :: self.window]))
            stats.record(self.levels, gained, tree.size)

    def first_window(self, history: list[list[int]], device: torch.device) -> Tensor:
        """Levels `[B, N−1, W]` to start from: each row's latest tokens, over and over."""
        size = self.levels * self.window
        rows = [[h[-1 - i % len(h)] for i in range(size)] for h in history]
        return torch.tensor(rows, device=device).view(len(rows), self.levels, self.window)

    def draft(self, levels: Tensor, tried: list[list[tuple[int, ...]]], trees: dict[int, Tree]) -> Draft:
        """Window and candidates as one tree; rows with fewer candidates than others repeat what they have."""
        most = max(len(t) for t in tried)
        tokens = levels.flatten(1)
        if most:
            filler = [0] * self.levels
            rows = [[x for i in range(most) for x in (t[i % len(t)] if t else filler)] for t in tried]
            tokens = torch.cat([tokens, torch.tensor(rows, device=levels.device)], dim=1)
        return Draft(tokens, None, trees[most])
