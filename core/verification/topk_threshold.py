"""Top-k and threshold: relaxed verification for retrieval drafts.

Xi et al., "A Decoding Acceleration Framework for Industrial Deployable LLM-based Recommender Systems" (DARE),
arXiv 2408.05676.

    allowed = top-k(p) ∩ {v : p(v) > t}, or {argmax p} if that is empty; keep x while x is allowed; then argmax p.

`topk_threshold` is the rule for a chain, `walk_topk_threshold` for a tree: the longest branch of allowed tokens.

Guarantee: heuristic; k = 1 is exact for greedy decoding. Each is its own greedy rule; target_probs are probabilities
before any temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.errors import InputError
from polyspec.verification.checks import check_chain, check_ids, check_knob
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, leading
from polyspec.verification.tree_walk import check_tree, path_of, reached, tree_depth


@rule(guarantee="heuristic", paper="2408.05676")
def topk_threshold(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    k: int = 2,
    threshold: float = 0.1,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Keep drafted tokens that are among the target's k best and likely enough.

    draft_tokens [B, N] long; draft_probs and generator are not used; target_probs [B, N+1, V]; k >= 1 (cut to V);
    threshold in [0, 1]. Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for the knobs.
    """
    _, length, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_knob("k", k, 1)
    check_knob("threshold", threshold, 0, 1)
    best = target_probs[:, :length].topk(min(k, vocab), dim=-1).indices
    among = best == draft_tokens.unsqueeze(-1)
    likely = at_tokens(target_probs[:, :length], draft_tokens) > threshold
    accepted = leading(among[..., 0] | (among.any(-1) & likely))
    return Verdict(accepted, at_position(target_probs, accepted).argmax(-1))


@rule(guarantee="heuristic", paper="2408.05676")
def walk_topk_threshold(
    tokens: Tensor,
    parents: Tensor,
    target_tokens: Tensor,
    target_probs: Tensor,
    *,
    k: int = 2,
    threshold: float = 0.1,
    depth: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The longest branch of allowed tokens, of several the one drafted first; then the target's token at its end.

    tokens [B, M] long, -1 where a node is missing; parents [M] or [B, M] long; target_tokens [B, M+1] long: the target's
    token at the root and after each node, its argmax in greedy decoding; target_probs [B, M+1, V]. Allowed behind a node
    are the target's token and those of the k - 1 likeliest others whose probability is above the threshold, so that k = 1
    follows the target's tokens and is exact, drawn ones too. k, threshold: as above; depth: the depth of the tree or more
    (default M). Returns (path [B, depth] node indices padded with -1, accepted [B], next_token [B]).
    Raises InputError for shapes, dtypes or devices that do not fit, ConfigError for the knobs.
    """
    parents = check_tree(tokens, parents, target_probs)
    check_ids("target_tokens", target_tokens, 2)
    check_knob("k", k, 1)
    check_knob("threshold", threshold, 0, 1)
    rows, nodes = tokens.shape
    if target_tokens.shape != (rows, nodes + 1):
        raise InputError(f"target_tokens must be [{rows}, {nodes + 1}], not {list(target_tokens.shape)}")
    vocab, levels = target_probs.shape[-1], tree_depth(depth, nodes)
    best = target_probs.topk(min(k, vocab), dim=-1).indices
    other = best != target_tokens.unsqueeze(-1)
    best = torch.where(other & (other.cumsum(-1) < k), best, -1)  # k - 1 of them, whether or not the target's is there
    before = (parents + 1).unsqueeze(-1).expand(-1, -1, best.shape[-1])
    among = ((best.gather(1, before) == tokens.unsqueeze(-1)) & (tokens >= 0).unsqueeze(-1)).any(-1)
    likely = target_probs.flatten(1).gather(1, (parents + 1) * vocab + tokens.clamp(min=0)) > threshold
    allowed = (tokens == target_tokens.gather(1, parents + 1)) | (among & likely)
    end = deepest(reached(allowed, parents, levels), parents, levels)
    above, here = functional.pad(parents + 1, (1, 0)), end.unsqueeze(1)
    on_path = torch.zeros_like(above, dtype=torch.bool)
    for _ in range(levels):
        on_path = on_path.scatter(1, here, True)
        here = above.gather(1, here)
    path, accepted, last = path_of(on_path[:, 1:], levels)
    return path, accepted, target_tokens.gather(1, last.unsqueeze(1)).squeeze(1)


def deepest(reachable: Tensor, parents: Tensor, depth: int) -> Tensor:
    """The first of the deepest of the `reachable [B, M]` nodes, as index [B] that counts the root as 0; 0 if there is none."""
    nodes = parents.shape[1]
    above = functional.pad(parents + 1, (1, 0))
    height = functional.pad(torch.ones_like(parents), (1, 0))
    for _ in range((depth - 1).bit_length() if depth else 0):  # pointer doubling, with the root at index 0
        height = height + height.gather(1, above)
        above = above.gather(1, above)
    first = torch.arange(nodes + 1, 0, -1, device=parents.device)  # earlier nodes win among equals
    return torch.where(functional.pad(reachable, (1, 0), value=True), height * (nodes + 2) + first, 0).argmax(1)
