"""The rows being generated: their tokens, how far each has come, and when it stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from polyspec.errors import InputError
from polyspec.verification import Verdict


class Sequences:
    """B rows in one buffer `tokens [B, P + max_new]`: the prompt as it was given (left padding included), then what
    was committed. Row b is `tokens[b, :lengths[b]]`, of which the first `pads[b]` are padding.

    prompt: `[B, P]`. mask: `[B, P]`, 1 = token. eos: token ids that end a row. stops: further criteria, called with
    one row `[1, L]` and answering `[1]` bool, asked about every committed prefix. emit: called with `[B]` tokens for
    each newly complete position (all running rows past it), for streamers.
    """

    def __init__(
        self,
        prompt: Tensor,
        max_new: int,
        *,
        mask: Tensor | None = None,
        eos: Tensor | None = None,
        pad: int = 0,
        stops: Sequence[Callable[[Tensor, None], Tensor]] = (),
        emit: Callable[[Tensor], None] | None = None,
    ):
        batch, self.prompt_length = prompt.shape
        self.limit = self.prompt_length + max_new
        self.pad = pad
        # one column more than can be filled: where a round's unaccepted tokens go
        self.tokens = torch.cat([prompt, prompt.new_full((batch, max_new + 1), pad)], dim=1)
        self.pads = [0] * batch if mask is None else (mask.shape[1] - mask.long().sum(1)).tolist()
        self.lengths = [self.prompt_length] * batch
        self.running = [max_new > 0] * batch
        self.eos, self.stops, self.emit = eos, stops, emit
        self.emitted = self.prompt_length
        self.device = prompt.device
        self.history = [row[p:] for row, p in zip(prompt.tolist(), self.pads, strict=True)]
        """Every row's tokens on the host, padding left out, for drafters that look things up."""
        self.pad_tensor = torch.tensor(self.pads, device=self.device)
        self._sync()

    def _sync(self) -> None:
        self.length_tensor = torch.tensor(self.lengths, device=self.device)
        self.running_tensor = torch.tensor(self.running, device=self.device)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def finished(self) -> bool:
        return not any(self.running)

    @property
    def remaining(self) -> int:
        """The most tokens any running row may still gain."""
        return max((self.limit - n for n, r in zip(self.lengths, self.running, strict=True) if r), default=0)

    @property
    def cached(self) -> list[int]:
        """What the target keeps of each row: every token but the last, padding not counted."""
        return [n - p - 1 for n, p in zip(self.lengths, self.pads, strict=True)]

    def tail(self, count: int = 1) -> Tensor:
        """Each row's last `count` tokens `[B, count]`."""
        columns = self.length_tensor[:, None] - count + torch.arange(count, device=self.device)
        return self.tokens.gather(1, columns.clamp_min(0))

    def positions(self, width: int) -> Tensor:
        """Absolute positions `[B, width]` of the next tokens, padding not counted: the same in any batch."""
        start = (self.length_tensor - self.pad_tensor)[:, None]
        return start + torch.arange(width, device=self.device)

    def prefixes(self, drafted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each row's tokens followed by `drafted [B, j]`, as (rows that are right, `[B, L]` tokens) per distinct L."""
        for length in sorted(set(self.lengths)):
            rows = torch.tensor([i for i, n in enumerate(self.lengths) if n == length], device=self.device)
            yield rows, torch.cat([self.tokens[:, :length], drafted], dim=1)

    def branches(self, paths: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """As `prefixes`, where each row has drafts of its own, `paths[b] [j_b]`."""
        ends = [n + len(p) for n, p in zip(self.lengths, paths, strict=True)]
        for end in sorted(set(ends)):
            rows = [b for b, e in enumerate(ends) if e == end]
            tokens = torch.nn.functional.pad(
                self.tokens[:, :end], (0, max(0, end - self.tokens.shape[1])), value=self.pad
            )
            for b in rows:
                tokens[b, self.lengths[b] : end] = paths[b]
            yield torch.tensor(rows, device=self.device), tokens

    def commit(self, drafted: Tensor, verdict: Verdict, best: Tensor, also: Tensor | None = None) -> list[int]:
        """Append each running row's accepted drafts (`drafted [B, N]`) and next token, up to its end.

        The round's one host synchronisation. best `[B, N+1]`, the highest score that each token was drawn from, shows
        on the way whether one is NaN. also `[B, X]` long travels along and is found in `self.also`, a list a row.
        Returns how many tokens each row gained (0 once finished).
        """
        width = drafted.shape[1] + 1
        column = torch.arange(width, device=self.device)
        accepted = verdict.accepted[:, None]
        new = torch.nn.functional.pad(drafted, (0, 1), value=self.pad)
        new = torch.where(column == accepted, verdict.next_token[:, None], new)
        counts = torch.minimum(verdict.accepted + 1, self.limit - self.length_tensor)
        ended = torch.zeros_like(self.running_tensor)
        if self.eos is not None:
            ends = torch.isin(new, self.eos) & (column < counts[:, None])
            ended = ends.any(1)
            counts = torch.where(ended, ends.int().argmax(1) + 1, counts)
        counts = torch.where(self.running_tensor, counts, 0)
        where = self.length_tensor[:, None] + column
        keep = column < counts[:, None]
        self.tokens.scatter_(1, torch.where(keep, where, self.limit), new)
        # NaN spreads to the maximum, and -inf means that nothing is allowed, as it may be behind a rejected draft
        sick = ((best.isnan() | best.isneginf() | (new < 0)) & keep).any(1)
        state = torch.stack([counts, ended.long(), sick.long()])
        rest = new.T if also is None else torch.cat([new.T, also.T])
        gained, done, bad, *new_tokens = torch.cat([state, rest]).tolist()
        if also is not None:
            self.also = [list(row) for row in zip(*new_tokens[width:], strict=True)]
            new_tokens = new_tokens[:width]
        if any(bad):
            raise InputError(
                f"no token can be drawn for row {bad.index(1)}: the target's or the drafter's scores are NaN or rule out "
                "every token; check the weights, the dtype (float16 overflows where bfloat16 does not) and the logits "
                "processors"
            )
        self.lengths = [n + g for n, g in zip(self.lengths, gained, strict=True)]
        self.running = [
            r and not d and n < self.limit for r, d, n in zip(self.running, done, self.lengths, strict=True)
        ]
        if self.stops:
            gained = self._apply_stops(gained)
        for row, (tokens, gain) in enumerate(zip(zip(*new_tokens, strict=True), gained, strict=True)):
            self.history[row].extend(tokens[:gain])
        self._sync()
        if self.emit is not None:
            self._emit_complete()
        return gained

    def _apply_stops(self, gained: list[int]) -> list[int]:
        for row, gain in enumerate(gained):
            first = self.lengths[row] - gain + 1
            for length in range(first, self.lengths[row] + 1):
                if any(bool(stop(self.tokens[row : row + 1, :length], None).any()) for stop in self.stops):
                    self.tokens[row, length : self.lengths[row]] = self.pad
                    gained[row] -= self.lengths[row] - length
                    self.lengths[row], self.running[row] = length, False
                    break
        return gained

    def _emit_complete(self) -> None:
        assert self.emit is not None
        open_rows = [n for n, r in zip(self.lengths, self.running, strict=True) if r]
        until = min(open_rows) if open_rows else max(self.lengths)
        for column in range(self.emitted, until):
            self.emit(self.tokens[:, column].cpu())
        self.emitted = max(self.emitted, until)

    def result(self) -> Tensor:
        """`[B, longest]`: prompts and generated tokens, finished rows filled with the pad token."""
        return self.tokens[:, : max(self.lengths)]
