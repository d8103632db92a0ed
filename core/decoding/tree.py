"""The loop for drafts that branch: all nodes are scored in one forward under an ancestor mask, and the target's own
draws say which path is walked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyspec.decoding.chain import in_lockstep
from polyspec.drafting.base import Context, Draft, Drafter
from polyspec.trees import chain
from polyspec.verification import Verdict
from polyspec.verification.tree_walk import path_of


class TreeLoop:
    """Speculative decoding with a tree of drafts (SpecInfer, 2305.09781; Sequoia, 2402.12374), for ragged batches.

    walk: a tree rule of polyspec.verification, `(tokens, parents, node_q, target_probs, depth=…, children=…) -> (path,
    accepted, next_token)`. It checks trees whose nodes were drawn (`Draft.probs`); where nodes are certain, a top-k tree say,
    the target's draw at each node picks the child, which is exact whatever the tree. `context.length` is the most depth.
    """

    def __init__(self, walk: Callable[..., tuple[Tensor, Tensor, Tensor]]):
        self.walk = walk

    def run(self, context: Context, drafter: Drafter) -> None:
        """Generate until every row of `context.sequences` has stopped."""
        target, sequences, stats = context.target, context.sequences, context.stats
        context.length.begin(context)
        while not sequences.finished:
            count = max(0, min(context.length.next(), sequences.remaining - 1))
            with stats.timed("draft"):
                draft = drafter.propose(count) if count > 0 else no_tree(sequences.tail(1))
                if target.lockstep:  # positions come from the cache's slots, so siblings cannot share one
                    draft = trunk(draft)
            tree = draft.tree
            assert tree is not None
            with stats.timed("target"):
                output = target.forward(torch.cat([sequences.tail(1), draft.tokens], dim=1), tree)
            with stats.timed("verify"):
                scores = context.processing.scores(output.logits, sequences, draft.tokens, tree)
                positions = sequences.positions(1) + tree.depth.to(sequences.device)
                path, accepted, token = self.step(context, draft, scores, positions)
                drafted = draft.tokens.gather(1, path.clamp(min=0))
                verdict = Verdict(accepted, token)
                if target.lockstep:
                    verdict = in_lockstep(verdict, drafted, sequences.running_tensor)
                # offsets of the committed token and of the walked nodes among the tokens just scored
                kept = torch.nn.functional.pad(path + 1, (1, 0)).clamp(min=0)
                best = scores.amax(-1).gather(1, kept)
                gained = sequences.commit(drafted, verdict, best)
                target.keep_path(kept[:, : max(gained)])
                target.rollback(sequences.cached, sequences.running)
            with stats.timed("draft"):
                drafter.observe(along(output.hidden, kept[:, : max(gained)]), verdict.accepted)
            stats.record(tree.height, gained, tree.size)
            context.length.observe(tree.height, gained, stats)

    def step(self, context: Context, draft: Draft, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Walk the tree of `draft` by scores `[B, M+1, V]` at absolute positions `[B, M+1]`: what the tree rule returns."""
        return context.draws.walk(self.walk, draft, scores, positions)


def along(hidden: tuple[Tensor, ...], kept: Tensor) -> tuple[Tensor, ...]:
    """Hidden states `[S, T, d]` at the offsets `kept [B, D]`, for both streams under guidance: `[S, D, d]`."""
    if not hidden:
        return hidden
    index = kept if hidden[0].shape[0] == kept.shape[0] else torch.cat([kept, kept])
    return tuple(h.gather(1, index[..., None].expand(-1, -1, h.shape[-1])) for h in hidden)


def trunk(draft: Draft) -> Draft:
    """Only the first child of every node, from the root down: a chain of certain tokens, as deep as the tree."""
    tree = draft.tree
    assert tree is not None
    later = torch.nn.functional.pad(tree.rank > 0, (1, 0))
    first = ~(tree.ancestors & later.unsqueeze(-2)).any(-1)[..., 1:]
    path, _, _ = path_of(first.expand_as(draft.tokens), tree.height)
    return Draft(draft.tokens.gather(1, path.clamp(min=0)), None, chain(tree.height).to(draft.tokens.device))


def no_tree(last: Tensor) -> Draft:
    """A draft of zero tokens: the round is plain decoding."""
    return Draft(last[:, :0], None, chain(0))
