"""Top-k and threshold: relaxed verification for retrieval drafts.

Xi et al., "A Decoding Acceleration Framework for Industrial Deployable LLM-based Recommender Systems" (DARE),
arXiv 2408.05676.

    allowed = top-k(p) ∩ {v : p(v) > t}, or {argmax p} if that is empty; keep x while x is allowed; then argmax p.

Guarantee: heuristic; k = 1 is exact for greedy decoding. It is its own greedy rule; target_probs are probabilities
before any temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification.checks import check_chain, check_knob
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, at_tokens, leading


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
