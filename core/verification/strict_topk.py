"""Strict top-K verification: the drafts stand only if they hold all K of the target's best.

Lin et al., "Efficient Inference for Large Language Model-based Generative Recommendation" (AtSpeed, ICLR 2025),
arXiv 2410.05165. A step of beam search ranks C candidates (surviving beams × what may follow them) by cumulative
log-probability s:

    chosen = top-K of s under the target;  accepted iff chosen ⊆ drafted.

Guarantee: exact: the chosen are the target's own beams, whatever was drafted; where the step is accepted they have been
scored already and the search goes on, else it ends the round with them. With scores perturbed by Gumbel noise
(1903.06059) it is exact sampling without replacement. It is its own greedy rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from polyspec.errors import InputError
from polyspec.verification.checks import check_ids, check_knob, check_scores
from polyspec.verification.rule import rule


@dataclass(frozen=True, slots=True)
class TopK:
    """A step of N-to-K verification. chosen `[B, K]` long: candidates, best first, -1 beyond a row's k or where there are
    no more. source `[B, K]` long: where each is among the drafted, -1 if it is not. accepted `[B]` bool: all are."""

    chosen: Tensor
    source: Tensor
    accepted: Tensor


@rule(guarantee="exact", paper="2410.05165")
def strict_topk(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_scores: Tensor,
    *,
    k: int | Tensor,
    most: int | None = None,
    generator: torch.Generator | None = None,
) -> TopK:
    """Keep the target's k best candidates; go on if all were drafted.

    draft_tokens `[B, N]` long: drafted candidates (-1: none); target_scores `[B, C]`: cumulative log-probabilities, -inf
    where there is no candidate; k: an int or `[B]` long, one a row; most: its maximum, to save a synchronisation;
    draft_probs and generator are not used. Raises InputError for shapes, dtypes or devices that do not fit, ConfigError
    for k < 1.
    """
    counts, most = check_topk(draft_tokens, target_scores, k, most)
    best = target_scores.topk(min(most, target_scores.shape[1]), dim=1)
    ranks = torch.arange(best.indices.shape[1], device=counts.device)
    chosen = torch.where((ranks < counts[:, None]) & (best.values > -torch.inf), best.indices, -1)
    return among(functional.pad(chosen, (0, most - chosen.shape[1]), value=-1), draft_tokens, target_scores.shape[1])


def among(chosen: Tensor, draft_tokens: Tensor, candidates: int) -> TopK:
    """`chosen [B, K]` with where each is in `draft_tokens [B, N]`; accepted if all are, and there are any."""
    table = chosen.new_full((len(chosen), candidates + 1), -1)
    index = torch.where(draft_tokens < 0, candidates, draft_tokens)
    table.scatter_(1, index, torch.arange(draft_tokens.shape[1], device=chosen.device).expand_as(index))
    source = torch.where(chosen < 0, -1, table.gather(1, chosen.clamp(min=0)))
    return TopK(chosen, source, ((source >= 0) | (chosen < 0)).all(1) & (chosen >= 0).any(1))


def check_topk(draft_tokens: Tensor, target_scores: Tensor, k: int | Tensor, most: int | None) -> tuple[Tensor, int]:
    """Shapes, dtypes and devices of one step; k as a tensor `[B]`, and its maximum."""
    check_ids("draft_tokens", draft_tokens, 2)
    check_scores("target_scores", target_scores, 2, draft_tokens.device)
    rows = len(target_scores)
    if len(draft_tokens) != rows:
        raise InputError(f"draft_tokens has {len(draft_tokens)} rows, target_scores {rows}")
    if isinstance(k, int):
        check_knob("k", k, 1)
        return torch.full((rows,), k, device=target_scores.device), k
    if k.shape != (rows,) or k.dtype != torch.long:
        raise InputError(f"k must be a whole number or long [{rows}], not {k.dtype} {list(k.shape)}")
    if most is None:
        check_knob("k", int(k.min()), 1)
        most = int(k.max())
    return k, most
