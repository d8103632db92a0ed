"""Deliberately wrong rules. Each of them has been somebody's bug; the tests of exactness must reject every one."""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.verification import Verdict, sample
from polyspec.verification.sampling import at_position, at_tokens, leading


def _chain(draft_tokens, draft_probs, target_probs, generator, accept=None, emit=None) -> Verdict:
    """Speculative sampling with one step replaced: accept(u, p, q) [B, N], emit(p, q, all_passed) [B, V] weights."""
    length = draft_tokens.shape[1]
    q_all = draft_probs
    if q_all is None:
        q_all = torch.nn.functional.one_hot(draft_tokens, target_probs.shape[-1]).float()
    p = at_tokens(target_probs[:, :length], draft_tokens)
    q = at_tokens(q_all, draft_tokens)
    u = torch.rand(p.shape, generator=generator)
    accepted = leading(u * q < p if accept is None else accept(u, p, q))
    passed = (accepted == length)[:, None]
    p_next = at_position(target_probs, accepted)
    q_next = at_position(q_all, accepted.clamp(max=length - 1))
    if emit is None:
        weights = torch.where(passed, p_next, (p_next - q_next).clamp(min=0))
    else:
        weights = emit(p_next, q_next, passed)
    return Verdict(accepted, sample(weights, generator, fallback=p_next))


def resample_from_p(x, q, p, *, generator=None):
    """Draws from p, not from the residual, after a rejection."""
    return _chain(x, q, p, generator, emit=lambda p, q, passed: p)


def resample_from_absolute_difference(x, q, p, *, generator=None):
    """|p - q| in place of [p - q]+."""
    return _chain(x, q, p, generator, emit=lambda p, q, passed: torch.where(passed, p, (p - q).abs()))


def resample_the_wrong_way_round(x, q, p, *, generator=None):
    """norm([q - p]+)."""
    return _chain(x, q, p, generator, emit=lambda p, q, passed: torch.where(passed, p, (q - p).clamp(min=0)))


def bonus_from_q(x, q, p, *, generator=None):
    """The token after a full acceptance comes from the drafter's last distribution."""
    return _chain(x, q, p, generator, emit=lambda p, q, passed: torch.where(passed, q, (p - q).clamp(min=0)))


def bonus_from_the_last_position(x, q, p, *, generator=None):
    """The token after a full acceptance comes from p_N, not p_{N+1}."""
    verdict = _chain(x, q, p, generator)
    stale = sample(p[:, -2], generator)
    return Verdict(verdict.accepted, torch.where(verdict.accepted == x.shape[1], stale, verdict.next_token))


def residual_one_position_late(x, q, p, *, generator=None):
    """The residual is taken with q of the position before."""
    verdict = _chain(x, q, p, generator)
    at = verdict.accepted
    late = (at_position(p, at) - at_position(q, (at - 1).clamp(min=0))).clamp(min=0)
    token = sample(late, generator, fallback=at_position(p, at))
    return Verdict(at, torch.where(at == x.shape[1], verdict.next_token, token))


def accept_with_q_over_p(x, q, p, *, generator=None):
    """min(1, q/p)."""
    return _chain(x, q, p, generator, accept=lambda u, p, q: u * p < q)


def accept_with_p_alone(x, q, p, *, generator=None):
    """Accepts with p(x), as if q were one-hot."""
    return _chain(x, q, p, generator, accept=lambda u, p, q: u < p)


def accept_likely_tokens(x, q, p, *, generator=None):
    """Accepts whenever p(x) >= q(x), else half the time."""
    return _chain(x, q, p, generator, accept=lambda u, p, q: (p >= q) | (u < 0.5))


def one_uniform_for_all_positions(x, q, p, *, generator=None):
    """One random number a row decides every position."""
    return _chain(x, q, p, generator, accept=lambda u, p, q: u[:, :1] * q < p)


def accept_after_a_rejection(x, q, p, *, generator=None):
    """Counts accepted tokens instead of leading ones."""
    length = x.shape[1]
    p_x, q_x = at_tokens(p[:, :length], x), at_tokens(q, x)
    accepted = (torch.rand(p_x.shape, generator=generator) * q_x < p_x).sum(1)
    return Verdict(accepted, sample(at_position(p, accepted), generator))


def softmax_next_to_argmax(x, q, p, *, generator=None):
    """Accepts argmax drafts as if they had been drawn from q."""
    return _chain(x, q, p, generator)


def block_with_p_weighted_residual_missing(x, q, p, *, generator=None):
    """Block verification whose last draw forgets the factor P."""
    from polyspec.verification import block_verification

    verdict = block_verification(x, q, p, generator=generator)
    at, length = verdict.accepted, x.shape[1]
    residual = (at_position(p, at) - at_position(q, at.clamp(max=length - 1))).clamp(min=0)
    token = sample(residual, generator, fallback=at_position(p, at))
    return Verdict(at, torch.where(at == length, verdict.next_token, token))


WRONG_FOR_SAMPLED_DRAFTS = [
    resample_from_p,
    resample_from_absolute_difference,
    resample_the_wrong_way_round,
    bonus_from_q,
    bonus_from_the_last_position,
    residual_one_position_late,
    accept_with_q_over_p,
    accept_with_p_alone,
    accept_likely_tokens,
    one_uniform_for_all_positions,
    accept_after_a_rejection,
    block_with_p_weighted_residual_missing,
]


# -- several candidates for one token: (target_probs [B, V], draft_tokens [B, K], draft_probs [B, V]) ------------------


def _siblings(p: Tensor, tokens: Tensor, q: Tensor, generator, update_q: bool, update_p: bool) -> Verdict:
    residual, accepted = p.clone(), torch.zeros(len(p), dtype=torch.long)
    q = q.clone()
    for j, x in enumerate(tokens.unbind(1)):
        passed = torch.rand(len(p), generator=generator) * at_tokens(q, x) < at_tokens(residual, x)
        accepted = torch.where((accepted == 0) & passed, j + 1, accepted)
        if update_p:
            left = (residual - q).clamp(min=0)
            residual = left / left.sum(-1, keepdim=True)
        if update_q:
            q = q.scatter(-1, x[:, None], 0)
            q = q / q.sum(-1, keepdim=True)
    kept = tokens.gather(1, (accepted - 1).clamp(min=0)[:, None])[:, 0]
    return Verdict(accepted, torch.where(accepted > 0, kept, sample(residual, generator, fallback=p)))


def siblings_against_the_full_q(p, tokens, q, *, generator=None):
    """Children drawn without replacement, all verified against the same q."""
    return _siblings(p, tokens, q, generator, update_q=False, update_p=True)


def siblings_against_the_full_p(p, tokens, q, *, generator=None):
    """Every child is verified against p itself."""
    return _siblings(p, tokens, q, generator, update_q=True, update_p=False)


WRONG_FOR_SIBLINGS = [siblings_against_the_full_q, siblings_against_the_full_p]


def walk_siblings_against_the_full_q(tokens, parents, node_q, target_probs, *, replacement=False, generator=None):
    """A tree drawn without replacement, verified as if with replacement."""
    from polyspec.verification import walk_recursive

    return walk_recursive(tokens, parents, node_q, target_probs, replacement=True, generator=generator)


def walk_next_token_from_the_parent(tokens, parents, node_q, target_probs, *, replacement=False, generator=None):
    """The token after the path is drawn from the distribution before its last node."""
    from polyspec.verification import walk_recursive

    path, accepted, _ = walk_recursive(
        tokens, parents, node_q, target_probs, replacement=replacement, generator=generator
    )
    before = torch.nn.functional.pad(path + 1, (1, 0)).gather(1, (accepted - 1).clamp(min=0)[:, None])[:, 0]
    return path, accepted, sample(at_position(target_probs, before.clamp(min=0)), generator)


def traversal_against_the_full_q(tokens, parents, node_q, target_probs, *, replacement=False, generator=None):
    """Traversal of a tree drawn without replacement that leaves q as it was after a rejection."""
    from polyspec.verification import traversal_verification

    return traversal_verification(tokens, parents, node_q, target_probs, replacement=True, generator=generator)


WRONG_FOR_TREES = [walk_siblings_against_the_full_q, walk_next_token_from_the_parent, traversal_against_the_full_q]
