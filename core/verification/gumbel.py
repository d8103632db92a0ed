"""Gumbel noise as a pure function of (row seed, position, token), and the rule built on it.

Daliri et al., "Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978.

    the target's token at position j is argmax_v(log p_j(v) + G_j(v)), and the drafter uses the same G_j;
    accept while drafted and target tokens are equal, then emit the target's token.

Guarantee: exact, and reproducible: the output equals plain sampling with the same noise, token for token, whatever
the drafter proposes. Drafted and target tokens agree with probability >= (1 - TV) / (1 + TV).

The noise is counter-based. A 64-bit key is mixed from seed and position (SplitMix64); token v gets 32 bits from a
three-round multiply-xorshift permutation of v under that key; with u = (bits + 1/2) / 2^32,
E = -log(1 - u) is exponential and G = -log E. Small u are exact, so the largest G, which decide, have full resolution.
Nothing is stored and there is no state: any slice of positions, on any batch shape, gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_chain, check_ids, check_scores
from polyspec.verification.greedy_match import greedy_match, match
from polyspec.verification.rule import Verdict, rule

CACHED = 1 << 16  # numbers worked on together on a CPU


def gumbel_noise(seed: int | Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise for absolute positions [B, T] -> [B, T, vocab] float32, on the positions' device.

    seed: [B] long, one per row, or an int s, which gives row r the seed s + r. Positions [T] are one row: [T, vocab].
    Two rows with the same seed, position and token have the same noise.
    """
    check_ids("positions", positions, 1 if positions.dim() == 1 else 2)
    rows = 1 if positions.dim() == 1 else positions.shape[0]
    if isinstance(seed, int):
        seeds = torch.arange(rows, device=positions.device) + seed
    else:
        seeds = seed.to(positions.device).reshape(-1)
        if seeds.shape[0] != rows or seeds.dtype != torch.long:
            raise InputError(f"seed must be an int or a long tensor [{rows}], not {seed.dtype} {list(seed.shape)}")
    if positions.dim() == 2:
        seeds = seeds.unsqueeze(-1)
    key = _mix64(_mix64(seeds + _signed(0x9E3779B97F4A7C15, 64)) ^ positions)
    noise = torch.empty(key.numel(), vocab, device=key.device, dtype=torch.float32)
    # on a CPU a few positions at a time, so that the dozen passes over them stay in the cache
    chunk = max(1, CACHED // max(1, vocab)) if key.device.type == "cpu" else max(1, key.numel())
    buffers = torch.empty(2, min(chunk, key.numel()), vocab, device=key.device, dtype=torch.int32)
    tokens = torch.arange(vocab, device=key.device, dtype=torch.int32).mul_(_signed(0x9E3779B9, 32))
    for keys, u in zip(key.reshape(-1, 1).split(chunk), noise.split(chunk), strict=True):
        u.copy_(_token_bits(keys, tokens, *buffers[:, : len(keys)]))
        u.add_(0.5).mul_(2.0**-32)  # the bits are signed: u in (-1/2, 1/2), of which the lower half moves up by 1
        u.sub_(u.floor()).clamp_(max=1 - 2.0**-24)
        u.neg_().log1p_().neg_().log_().neg_()
    return noise.view(*positions.shape, vocab)


def gumbel_argmax(probs: Tensor, noise: Tensor) -> Tensor:
    """argmax_v(log probs + noise): a draw from `probs [..., V]` under `noise [..., V]` -> [...] long."""
    return probs.float().log().add_(noise).argmax(-1)


@rule(guarantee="exact", paper="2408.07978", greedy=greedy_match)
def gumbel_match(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    *,
    noise: Tensor,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Keep the draft while it equals the target's own Gumbel draw.

    draft_tokens [B, N] long; draft_probs is not used; target_probs [B, N+1, V]; noise [B, N+1, V], from `gumbel_noise`
    at the drafted positions; generator is not used (the noise is all the randomness there is).
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    check_chain(draft_tokens, draft_probs, target_probs, generator)
    check_scores("noise", noise, 3, draft_tokens.device)
    if noise.shape != target_probs.shape:
        raise InputError(f"noise must be {list(target_probs.shape)} like target_probs, not {list(noise.shape)}")
    return match(draft_tokens, gumbel_argmax(target_probs, noise))


def _token_bits(key: Tensor, tokens: Tensor, x: Tensor, shifted: Tensor) -> Tensor:
    """Uniform bits x [K, V] int32 for keys [K, 1] int64 and tokens [V] (v · 0x9E3779B9), in place.

    Products wrap at 32 bits, as intended.
    """
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)
    torch.bitwise_xor(tokens, low, out=x)
    _xorshift(x, 17, shifted).mul_(_signed(0xED5AD4BB, 32))
    _xorshift(x, 11, shifted).add_(high).mul_(_signed(0xAC4C1B51, 32))
    _xorshift(x, 15, shifted).mul_(_signed(0x31848BAB, 32))
    return _xorshift(x, 14, shifted)


def _xorshift(x: Tensor, shift: int, buffer: Tensor) -> Tensor:
    """x ^= x >>> shift in place; torch shifts int32 arithmetically, hence the mask."""
    torch.bitwise_right_shift(x, shift, out=buffer)
    return x.bitwise_xor_(buffer.bitwise_and_((1 << (32 - shift)) - 1))


def _mix64(x: Tensor) -> Tensor:
    """The SplitMix64 finaliser on int64, wrapping."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int, bits: int) -> int:
    """The two's-complement integer with the same bits."""
    return value - (1 << bits) if value >> (bits - 1) else value
