"""Principled coarse-grained acceptance (PCG).

"Principled Coarse-Grained Acceptance for Speculative Decoding in Speech", arXiv 2511.13732.

    G(t) = {t' : cos(E_t, E_t') > θ}, overlapping groups;  S(t) = the groups that contain t;
    p_c(g) = Σ_{t in g} p(t) / |S(t)|, likewise q_c;
    x ~ q, g uniform on S(x): accept x with probability min(1, p_c(g) / q_c(g)); at the first rejection
    repeat: t ~ p, g uniform on S(t), until t is kept with probability [1 - q_c(g) / p_c(g)]+.

The repetition is not run: a kept t has the distribution norm(p(t)/|S(t)| · Σ_{g in S(t)} [1 - q_c(g)/p_c(g)]+), which
is drawn from directly.
Guarantee: group-exact. Token and group (t, g) are emitted with g distributed as p_c; for groups that do not overlap
the emitted token's group has exactly the target's distribution. Inside a group, q's preferences remain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_chain, check_ids, check_knob
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.rule import Verdict, rule
from polyspec.verification.sampling import at_position, draft_row, leading, sample, uniform


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """Groups of tokens, overlapping or not; every token is in at least one.

    Absent entries are given as -1 and kept as V in `members`, as G in `containing`: the index of a zero at the end.
    """

    members: Tensor  # [G, m] long: the tokens of each group
    containing: Tensor  # [V, s] long: the groups of each token, S(t)

    def __post_init__(self) -> None:
        for name, end in (("members", len(self.containing)), ("containing", len(self.members))):
            table = getattr(self, name)
            check_ids(f"groups.{name}", table, 2)
            object.__setattr__(self, name, torch.where(table < 0, end, table))

    @classmethod
    def from_labels(cls, labels: Tensor) -> TokenGroups:
        """A partition: labels [V] long, the group of each token, in 0 .. G-1."""
        check_ids("labels", labels, 1)
        sizes = torch.bincount(labels)
        order = labels.argsort(stable=True)
        slot = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]
        members = labels.new_full((len(sizes), int(sizes.max())), -1)
        members[labels[order], slot] = order
        return cls(members, labels.unsqueeze(-1))

    @classmethod
    def from_embeddings(
        cls, embeddings: Tensor, threshold: float, singletons: Sequence[int] = (), largest: int = 64, chunk: int = 1024
    ) -> TokenGroups:
        """G(t) = {t' : cos(E_t, E_t') > threshold} from the target's embedding table [V, d].

        `singletons` (end of sequence, special tokens) are alone in their groups. A pair counts only if each is among
        the other's `largest` nearest, which bounds the tables; the guarantee holds for any groups.
        """
        check_knob("threshold", threshold, -1, 1)
        cosine, near = _nearest(embeddings, singletons, largest, chunk)
        near = _mutual(near.masked_fill(cosine <= threshold, -1), chunk)
        return cls(near, near)

    @classmethod
    def of_mean_size(
        cls, embeddings: Tensor, mean_size: float, singletons: Sequence[int] = (), largest: int = 64, chunk: int = 1024
    ) -> TokenGroups:
        """`from_embeddings` with the threshold for which the groups of the tokens that are no `singletons` have `mean_size`
        members in the mean, or as near to that as there is (ties in the cosine, and `largest`, may leave a gap)."""
        check_knob("mean_size", mean_size, 1)
        cosine, near = _nearest(embeddings, singletons, largest, chunk)
        cosine = cosine.masked_fill(_mutual(near, chunk) < 0, -2)
        alone = len(set(singletons))
        wanted = round(mean_size * max(1, len(near) - alone)) + alone
        if wanted >= cosine.numel():
            return cls.from_embeddings(embeddings, -1.0, singletons, largest, chunk)
        threshold = cosine.flatten().topk(wanted + 1).values[-1]
        near = _mutual(near.masked_fill(cosine <= threshold, -1), chunk)
        return cls(near, near)


@rule(guarantee="group-exact", paper="2511.13732", greedy=greedy_match)
def coarse_grained(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    groups: TokenGroups,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Verify a chain at the level of token groups.

    draft_tokens [B, N] long, drawn from draft_probs [B, N, V] (None: a deterministic draft, q one-hot);
    target_probs [B, N+1, V]; groups over the same V.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    rows, length, vocab = check_chain(draft_tokens, draft_probs, target_probs, generator)
    if groups.containing.shape[0] != vocab or groups.members.device != draft_tokens.device:
        raise InputError(
            f"groups must cover V={vocab} tokens on {draft_tokens.device}, "
            f"not {groups.containing.shape[0]} on {groups.members.device}"
        )
    if length == 0:
        return Verdict(draft_tokens.new_zeros(rows), sample(target_probs[:, 0].float(), generator))
    count = len(groups.members)
    share = 1 / (groups.containing < count).sum(-1).float()  # 1 / |S(t)|

    listed = groups.containing[draft_tokens]  # S(x)
    order = (listed < count) * (1 + uniform(listed, generator))
    group = listed.gather(-1, order.argmax(-1, keepdim=True)).squeeze(-1)  # uniform on S(x)
    members = groups.members[group]  # [B, N, m]
    p_group = _mass(target_probs[:, :length], members, share)
    q_group = share[draft_tokens] if draft_probs is None else _mass(draft_probs, members, share)
    accepted = leading(uniform(draft_tokens, generator) * q_group < p_group)

    p = at_position(target_probs, accepted)
    q = draft_row(draft_tokens, draft_probs, accepted, vocab)  # zero after a full acceptance: weights are then p
    p_c, q_c = _sums(groups.members, torch.cat([p, q]) * share).chunk(2)
    keep = torch.where(p_c > 0, 1 - q_c / p_c, 0).clamp(min=0)  # [B, G]
    weights = p * share * _sums(groups.containing, keep)
    return Verdict(accepted, sample(weights, generator, fallback=p))


@rule(guarantee="group-exact", paper="2511.13732", greedy=greedy_match, takes=("token_groups",))
def pcg(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    token_groups: Callable[[float], TokenGroups],
    mean_size: float = 12.0,
    generator: torch.Generator | None = None,
) -> Verdict:
    """`coarse_grained` over the target's own groups, which have `mean_size` members in the mean."""
    groups = token_groups(mean_size)
    return coarse_grained(draft_tokens, draft_probs, target_probs, groups=groups, generator=generator)


def _nearest(embeddings: Tensor, singletons: Sequence[int], largest: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Each token's `largest` nearest by the cosine [V, n] and their ids [V, n], itself first (2); at -2 singletons' others."""
    check_knob("largest", largest, 1)
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    every = torch.arange(len(unit), device=unit.device)
    alone = torch.isin(every, torch.tensor(list(singletons), dtype=torch.long, device=unit.device))
    parts = []
    for tokens in every.split(chunk):
        cosine = (unit[tokens] @ unit.T).masked_fill_(alone | alone[tokens].unsqueeze(1), -2)
        cosine.scatter_(1, tokens.unsqueeze(1), 2)  # every token is in its own group
        parts.append(cosine.topk(min(largest, len(unit))))
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _mutual(near: Tensor, chunk: int) -> Tensor:
    """near [V, n], -1 also for those that do not have the token among their own: rounding must not part a pair either."""
    every = torch.arange(len(near), device=near.device)
    mutual = [
        (near[row.clamp(min=0)] == tokens.view(-1, 1, 1)).any(-1) & (row >= 0)
        for tokens, row in zip(every.split(chunk), near.split(chunk), strict=True)
    ]
    return near.masked_fill(~torch.cat(mutual), -1)


def _mass(probs: Tensor, members: Tensor, share: Tensor) -> Tensor:
    """Σ over members [B, N, m] of probs [B, N, V] / |S(t)| -> [B, N]."""
    present = members.clamp(max=len(share) - 1)
    return torch.where(members < len(share), probs.gather(-1, present).float() * share[present], 0).sum(-1)


def _sums(table: Tensor, values: Tensor) -> Tensor:
    """Sums over the entries of table [G, m] of values [B, V], with a zero at index V -> [B, G].

    One bag of embeddings per group and one embedding dimension per row reads the table once for all rows.
    """
    rows, size = values.shape
    columns = values.new_zeros(size + 1, rows)
    columns[:-1] = values.T
    return torch.nn.functional.embedding_bag(table, columns, mode="sum").T
