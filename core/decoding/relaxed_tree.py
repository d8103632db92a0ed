"""The tree loop for rules that keep other tokens than the target's own where the target finds them likely enough.

A Decoding Acceleration Framework for Industrial Deployable LLM-based Recommender Systems (DARE), 2408.05676.
"""

from __future__ import annotations

from torch import Tensor

from polyspec.decoding.tree import TreeLoop
from polyspec.drafting.base import Context, Draft


class RelaxedTree(TreeLoop):
    """Certain nodes, walked by a rule `(tokens, parents, target_tokens, target_probs, depth=…) -> (path, accepted,
    next_token)` of polyspec.verification. The token behind the path is drawn as in plain decoding: the likeliest one, or
    in a sampled run one from the processed distribution, whose likely tokens are kept where they were drafted."""

    def step(self, context: Context, draft: Draft, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert draft.tree is not None
        drawn = context.draws.draw(scores, positions)
        return self.walk(draft.tokens, draft.tree.parents, drawn, scores.softmax(-1), depth=draft.tree.height)
