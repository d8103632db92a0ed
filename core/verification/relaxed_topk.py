"""Relaxed sampling verification of top-K drafts: what the target finds likely enough stands.

Lin et al., "Efficient Inference for Large Language Model-based Generative Recommendation" (AtSpeed, ICLR 2025),
arXiv 2410.05165. With p and q the softmax of the cumulative log-probabilities of all candidates of a step, under
target and drafter, and N candidates drawn from q without replacement:

    keep each drafted y with probability min(1, p(y) / q(y));
    ≥ K kept: K of them at random, and the step is accepted;
    else:     all that were kept, filled up by draws without replacement from norm([p - q]+), and the round ends;
    nothing drafted: K draws without replacement from p.

Guarantee: heuristic, as published: K single tests are not one test of a list, so the list has no stated distribution;
quality has to be measured. Where the residual runs out of candidates, p fills up (the paper does not say).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.errors import ConfigError, InputError
from polyspec.verification.checks import check_generator, check_scores
from polyspec.verification.rule import rule
from polyspec.verification.strict_topk import TopK, among, check_topk

TIER = 1e4  # far beyond any log-probability with noise: candidates of a higher tier always come first


@rule(guarantee="heuristic", paper="2410.05165")
def relaxed_topk(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_scores: Tensor,
    *,
    k: int | Tensor,
    most: int | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    best: bool = False,
) -> TopK:
    """Keep drafted candidates with probability p/q, and fill up to k.

    draft_tokens `[B, N]` long: distinct candidates drawn from q (-1: none); draft_probs `[B, C]`: q, may sum to less than
    one where some of what it was drawn over has been dropped since, None if N = 0; target_scores `[B, C]`: cumulative log-
    probabilities, -inf where there is no candidate; k: an int or `[B]` long; most: its maximum, to save a synchronisation;
    temperature: of p, the drafter's own, 1 as published. Towards 0 the list becomes the likeliest, which matters where no
    item is likely: there K draws are K items at random; best: of those kept, the likeliest stand instead of random ones,
    and what fills up, or is taken where nothing was drafted, is the likeliest too. Raises InputError for shapes, dtypes or
    devices that do not fit, ConfigError for k < 1 or a temperature ≤ 0.
    """
    counts, most = check_topk(draft_tokens, target_scores, k, most)
    check_generator(generator, target_scores.device)
    if not temperature > 0:
        raise ConfigError(f"temperature must be > 0, got {temperature!r}")
    # a row without candidates has no softmax; candidates too unlikely for float32 are candidates nevertheless
    log_p = (target_scores.float() / temperature).log_softmax(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    p, there = log_p.exp(), target_scores > -torch.inf
    if draft_probs is None:
        if draft_tokens.shape[1]:
            raise InputError("relaxed_topk needs draft_probs, the distribution that the drafts were drawn from")
        draft_probs = torch.zeros_like(p)
    check_scores("draft_probs", draft_probs, 2, p.device)
    if draft_probs.shape != p.shape:
        raise InputError(f"draft_probs must be {list(p.shape)} like target_scores, not {list(draft_probs.shape)}")
    q = draft_probs
    drafted = torch.zeros(p.shape[0], p.shape[1] + 1, dtype=torch.bool, device=p.device)
    drafted = drafted.scatter_(1, torch.where(draft_tokens < 0, p.shape[1], draft_tokens), True)[:, :-1]
    u, noise = (torch.rand(p.shape, generator=generator, device=p.device) for _ in range(2))
    # Gumbel: the best of log w + noise are draws from w
    noise = torch.zeros_like(p) if best else -(-noise.clamp(1e-20, 1 - 6e-8).log()).log()
    kept = drafted & (u * q < p)
    residual = (p - q).clamp(min=0).log() + noise
    value = log_p if best else torch.where(residual > -torch.inf, residual, log_p + noise - TIER)
    value = torch.where(kept, (log_p if best else noise) + TIER, value)
    top = value.topk(min(most, value.shape[1]), dim=1)
    ranks = torch.arange(top.indices.shape[1], device=counts.device)
    chosen = torch.where((ranks < counts[:, None]) & (top.values > -torch.inf), top.indices, -1)
    found = among(functional.pad(chosen, (0, most - chosen.shape[1]), value=-1), draft_tokens, p.shape[1])
    wanted = torch.minimum(counts, there.sum(1))
    return TopK(found.chosen, found.source, (kept.sum(1) >= wanted) & (wanted > 0))
