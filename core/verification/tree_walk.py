"""Verifying a drafted tree by walking down from its root.

Layout: node m of a row carries tokens[m] and hangs under node parents[m] < m; -1 is the root, the last committed token.
The target's answer *after* the root is at index 0, its answer after node m at index m + 1. Missing nodes have token -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification.checks import check_ids


def walk_deterministic(
    tokens: Tensor, parents: Tensor, target_tokens: Tensor, *, depth: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the tokens the target chose, for as long as some child carries them.

    tokens [B, M] long; parents [M] or [B, M] long; target_tokens [B, M+1] long: the target's token at the root and after
    each node (an argmax, argmax(log p + Gumbel), or a draw from p). `depth` (default M) is the width of the path.
    Returns (path [B, depth] node indices padded with -1, accepted [B], next_token [B]).
    Exact: the output is what the target chose at each step, so it is the target's own sample.
    Of siblings with one token the first counts. Raises InputError for shapes that do not fit.
    """
    check_ids("tokens", tokens, 2)
    check_ids("target_tokens", target_tokens, 2)
    rows, nodes = tokens.shape
    if target_tokens.shape != (rows, nodes + 1):
        raise InputError(f"target_tokens must be [{rows}, {nodes + 1}], not {list(target_tokens.shape)}")
    if parents.shape not in {(nodes,), (rows, nodes)}:
        raise InputError(f"parents must be [{nodes}] or [{rows}, {nodes}], not {list(parents.shape)}")
    parents = parents.expand(rows, nodes)
    depth = nodes if depth is None else depth
    index = torch.arange(nodes, device=tokens.device)

    twins = (tokens.unsqueeze(2) == tokens.unsqueeze(1)) & (parents.unsqueeze(2) == parents.unsqueeze(1))
    first = ~(twins & (index < index.unsqueeze(-1))).any(-1)
    on_path = first & (tokens == target_tokens.gather(1, parents + 1))
    # a node is on the path when it and all its ancestors match: pointer doubling, index 0 being the root
    reached = torch.cat([torch.ones_like(on_path[:, :1]), on_path], 1)
    above = torch.cat([torch.zeros_like(parents[:, :1]), parents + 1], 1)
    for _ in range(max(depth - 1, 0).bit_length()):
        reached = reached & reached.gather(1, above)
        above = above.gather(1, above)
    on_path = reached[:, 1:]

    accepted = on_path.sum(1)
    # parents come before children, so ascending order is the order of the path
    path = torch.where(on_path, index, nodes).sort(1).values[:, :depth]
    path = torch.where(path == nodes, -1, path)
    if depth > nodes:
        path = torch.nn.functional.pad(path, (0, depth - nodes), value=-1)
    last = torch.where(on_path, index + 1, 0).amax(1, keepdim=True) if nodes else accepted.unsqueeze(-1)
    return path, accepted, target_tokens.gather(1, last).squeeze(1)
