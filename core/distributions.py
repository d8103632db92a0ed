"""From logits to what plain sampling would draw from: processors over drafted prefixes, and how tokens are drawn.

`Processing` turns the logits of many drafted positions into scores (log-probabilities up to a constant) by the very
logits processors `generate` prepared: in one batched call where they do not look at the history, prefix by prefix
where they do (or by their method `over_drafts`, if they have one). A `Draws` then picks tokens from scores, for drafter and
target alike, and calls the acceptance rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from polyspec.errors import ConfigError
from polyspec.verification import Verdict, greedy_match, gumbel_noise, walk_deterministic
from polyspec.verification.sampling import sample

if TYPE_CHECKING:
    from polyspec.decoding.sequences import Sequences
    from polyspec.drafting import Draft
    from polyspec.trees import Tree

FEW = 1024  # tokens of which several are drawn at once; of more, one after the other costs less

# Processors whose result depends on the scores of the same position alone. A processor of your own joins them with an
# attribute `history_free = True`; without it, it is called prefix by prefix, unless it has a method `over_drafts(scores,
# sequences, drafts, tree, first)` that works all positions out at once, as `Processing.scores` takes them.
HISTORY_FREE: tuple[type, ...] = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)


def is_history_free(processor: LogitsProcessor) -> bool:
    """Whether `processor` may be applied to all drafted positions at once."""
    return getattr(processor, "history_free", type(processor) in HISTORY_FREE)


@dataclass(frozen=True, slots=True)
class Constraint:
    """Which tokens a position may hold, by the position alone: the i-th new token of a row (from 0) is one of set
    `kinds[i]`, behind the last entry one of the last. sets `[K, V]` bool; kinds `[L]` long."""

    sets: Tensor
    kinds: Tensor

    def allowed(self, index: Tensor) -> Tensor:
        """`[B, T, V]` bool for the new tokens `index [B, T]`."""
        return self.sets[self.kinds[index.clamp(max=len(self.kinds) - 1)]]

    def fit(self, tokens: Tensor, index: Tensor) -> Tensor:
        """`tokens [B, T]`, those that may not stand at `index [B, T]` replaced by the first that may."""
        kind = self.kinds[index.clamp(max=len(self.kinds) - 1)]
        return torch.where(self.sets[kind, tokens], tokens, self.sets.long().argmax(1)[kind])


class Processing:
    """Applies a constraint, then a `LogitsProcessorList` over drafted prefixes, in order. Scores are float32.

    Target and drafter are scored by the same object, so a constraint holds for p and q alike."""

    def __init__(
        self, processors: LogitsProcessorList | Sequence[LogitsProcessor] = (), constraint: Constraint | None = None
    ):
        self.processors = [(p, is_history_free(p)) for p in processors]
        self.constraint = constraint
        self.history_free = all(free for _, free in self.processors)

    def scores(
        self, logits: Tensor, sequences: Sequences, drafts: Tensor, tree: Tree | None = None, first: int = 0
    ) -> Tensor:
        """Processed scores `[B, T, V]` of logits `[B, T, V]`: column t follows each row's committed tokens and then
        `drafts[:, :first + t]`; with a tree, the ancestors of its node first + t (0: the root) among the drafts."""
        batch, width, vocab = logits.shape
        scores = logits.to(torch.float32, copy=bool(self.processors))
        if self.constraint is not None:
            begun = (sequences.length_tensor - sequences.prompt_length)[:, None]
            ahead = torch.arange(first, first + width, device=logits.device)
            index = begun + (ahead if tree is None else tree.depth[..., first : first + width])
            scores = scores.masked_fill(~self.constraint.allowed(index), float("-inf"))
        for processor, free in self.processors:
            if free:
                # such a processor may check the batch size of the ids, but not read them
                ids = drafts.new_zeros((batch * width, 1))
                scores = processor(ids, scores.reshape(batch * width, vocab)).view(batch, width, vocab)  # type: ignore[arg-type]
            elif (over_drafts := getattr(processor, "over_drafts", None)) is not None:
                scores = over_drafts(scores, sequences, drafts, tree, first)
            else:
                out = scores.clone()
                for column in range(width):
                    if tree is None:
                        prefixes = sequences.prefixes(drafts[:, : first + column])
                    else:
                        above = tree.ancestors[..., first + column, 1:].expand(batch, -1)
                        prefixes = sequences.branches([d[a] for d, a in zip(drafts, above, strict=True)])
                    for rows, prefix in prefixes:
                        # the whole batch each time: a processor may know its rows by their index
                        processed = processor(prefix, scores[:, column].clone())  # type: ignore[arg-type]
                        out[rows, column] = processed[rows]
                scores = out
        return scores


class Draws(Protocol):
    """How tokens are drawn from scores, and so how drafts are checked."""

    fixed_rounds: bool
    """Whether the same seed gives the same output only if rounds are cut alike: length policies then ignore the clock."""

    def draw(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Tokens `[B, T]` from scores `[B, T, V]` at absolute positions `[B, T]`."""
        ...

    def draft_probs(self, scores: Tensor) -> Tensor | None:
        """The distribution a drafter's `draw` came from, to hand to the rule; None if the draw was deterministic."""
        ...

    def draft(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """`draw` and `draft_probs` together."""
        return self.draw(scores, positions), self.draft_probs(scores)

    def outlook(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Scores `[B, T, V]` by which a drafter that offers several candidates should rank them."""
        ...

    def candidates(self, scores: Tensor, positions: Tensor, count: int) -> Tensor:
        """`count` different tokens a position `[B, T, count]` in the order to try them, from scores `[B, T, V]` at
        positions `[B, T]`: drawn without replacement from what `draft_probs` gives, or the best where draws are certain.
        Where fewer can be drawn the first is repeated, which no rule tries again."""
        ...

    def verify(self, rule: Callable[..., Verdict], draft: Draft, scores: Tensor, positions: Tensor) -> Verdict:
        """Check `draft` against target scores `[B, N+1, V]`."""
        ...

    def refine(
        self, rule: Callable[..., tuple[Tensor, Tensor]], x: Tensor, q: Tensor | None, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Refine a window `x [B, W]` drawn from q against scores `[B, W+1, V]`: new tokens `[B, W+1]`, kept `[B, W]`
        and the distributions `[B, W+1, V]` the new tokens come from (None: they are certain)."""
        ...

    def walk(
        self, rule: Callable[..., tuple[Tensor, Tensor, Tensor]], draft: Draft, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Walk the tree of `draft` by scores `[B, M+1, V]` at absolute positions `[B, M+1]`: nodes on the path
        `[B, depth]` padded with -1, how many `[B]`, and the token that follows them `[B]`."""
        ...


class SharedNoise:
    """Gumbel noise by (row seed, position, token), which drafter and target, and one round and the next, ask for again.

    seeds `[B]` long. On a CPU, where noise costs more than looking it up, as many positions a row are remembered as the
    widest request had; with a small vocabulary half as many again, made some at a time before they are asked
    for.
    """

    AHEAD = 1 << 20  # numbers, at most, that are made before they are asked for

    def __init__(self, seeds: Tensor):
        self.seeds = seeds
        self.known = torch.empty(0, 0, dtype=torch.long)  # [B, C] the position that each slot holds
        self.noise = torch.empty(0, 0, 0)  # [B, C, V]

    def __call__(self, positions: Tensor, vocab: int) -> Tensor:
        """Noise `[B, T, vocab]` for absolute positions `[B, T]`; a tensor of the caller's own."""
        rows, width = positions.shape
        if positions.device.type != "cpu" or not width:
            return gumbel_noise(self.seeds, positions, vocab)
        if self.known.shape[1] < width or self.noise.shape[2] != vocab:
            slots = max(width, min(width + width // 2, self.AHEAD // (rows * vocab)))
            self.known = torch.full((rows, slots), -1)
            self.noise = torch.empty(rows, slots, vocab)
        slots, first = self.known.shape[1], positions.amin(1, keepdim=True)
        if bool((positions.amax(1, keepdim=True) - first >= slots).any()):  # two of them would share a slot
            return gumbel_noise(self.seeds, positions, vocab)
        slot = positions % slots
        if bool((self.known.gather(1, slot) != positions).any()):
            wanted = first + torch.arange(slots) if slots * rows * vocab <= self.AHEAD else positions
            at = wanted % slots
            r, column = (self.known.gather(1, at) != wanted).nonzero(as_tuple=True)
            place, position = at[r, column], wanted[r, column]
            self.noise[r, place] = gumbel_noise(self.seeds[r], position[:, None], vocab)[:, 0]
            self.known[r, place] = position
        return self.noise[torch.arange(rows)[:, None], slot]


class Greedy(Draws):
    """Temperature 0: the highest score; the rule's greedy form checks drafts."""

    fixed_rounds = False

    def draw(self, scores: Tensor, positions: Tensor) -> Tensor:
        return scores.argmax(-1)

    def outlook(self, scores: Tensor, positions: Tensor) -> Tensor:
        return scores

    def draft_probs(self, scores: Tensor) -> Tensor | None:
        return None

    def candidates(self, scores: Tensor, positions: Tensor, count: int) -> Tensor:
        return scores.topk(count).indices

    def verify(self, rule: Callable[..., Verdict], draft: Draft, scores: Tensor, positions: Tensor) -> Verdict:
        form = getattr(getattr(rule, "func", rule), "greedy", greedy_match)
        if form is greedy_match:
            return greedy_match(draft.tokens, None, scores)  # not the softmax: it can make ties of near-ties
        return form(draft.tokens, draft.probs, scores.softmax(-1), **getattr(rule, "keywords", {}))

    def refine(
        self, rule: Callable[..., tuple[Tensor, Tensor]], x: Tensor, q: Tensor | None, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y = scores.argmax(-1)
        return y, y[:, :-1] == x, None

    def walk(
        self, rule: Callable[..., tuple[Tensor, Tensor, Tensor]], draft: Draft, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return follow(draft, self.draw(scores, positions))


class Independent(Draws):
    """Fresh randomness for every draw, from one torch.Generator: drafts are checked by the recipe's rule.

    seeds `[B]`: for rules that share Gumbel noise between rounds (SCD-GS). fixed_rounds: a seed was given."""

    def __init__(self, generator: torch.Generator, seeds: Tensor, fixed_rounds: bool = True):
        self.generator = generator
        self.noise = SharedNoise(seeds)
        self.fixed_rounds = fixed_rounds

    def draw(self, scores: Tensor, positions: Tensor) -> Tensor:
        return sample(scores.softmax(-1), generator=self.generator)

    def draft(self, scores: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        q = scores.softmax(-1)
        return sample(q, generator=self.generator), q

    def outlook(self, scores: Tensor, positions: Tensor) -> Tensor:
        return scores

    def draft_probs(self, scores: Tensor) -> Tensor | None:
        return scores.softmax(-1)

    def candidates(self, scores: Tensor, positions: Tensor, count: int) -> Tensor:
        left, drawn = scores.softmax(-1), []
        if count > 1 and scores.shape[-1] <= FEW:
            # an exponential race: the first to arrive are draws without replacement, in order
            arrival = torch.empty_like(left).exponential_(generator=self.generator)
            key, tokens = (left / arrival).nan_to_num_(nan=0.0).topk(min(count, left.shape[-1]), dim=-1)
            first = torch.where(key[..., :1] > 0, tokens[..., :1], 0)  # only if scores are NaN
            tokens = torch.where(key > 0, tokens, first)
            return torch.cat([tokens, first.expand(*tokens.shape[:-1], count - tokens.shape[-1])], dim=-1)
        for _ in range(count):
            token = sample(left, self.generator)
            drawn.append(torch.where(token < 0, drawn[0] if drawn else 0, token))  # at first only if scores are NaN
            left = left.scatter(-1, drawn[-1][..., None], 0.0)
        return torch.stack(drawn, dim=-1)

    def verify(self, rule: Callable[..., Verdict], draft: Draft, scores: Tensor, positions: Tensor) -> Verdict:
        return rule(draft.tokens, draft.probs, scores.softmax(-1), generator=self.generator)

    def refine(
        self, rule: Callable[..., tuple[Tensor, Tensor]], x: Tensor, q: Tensor | None, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        p = scores.softmax(-1)
        if q is None:
            q = torch.zeros_like(p[:, :-1]).scatter_(-1, x[..., None], 1.0)

        y, kept = rule(x, q, p, generator=self.generator, noise=lambda: self.noise(positions, p.shape[-1]))
        return y, kept, p

    def walk(
        self, rule: Callable[..., tuple[Tensor, Tensor, Tensor]], draft: Draft, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if draft.probs is None and not getattr(getattr(rule, "func", rule), "certain", False):
            return follow(draft, self.draw(scores, positions))
        assert draft.tree is not None
        tree, p = draft.tree, scores.softmax(-1)
        bounds = {"depth": tree.height, "children": tree.width}
        return rule(draft.tokens, tree.parents, draft.probs, p, **bounds, generator=self.generator)


class Coupled(Draws):
    """Gumbel noise fixed by (row seed, position, token): drafter and target share it, and a draft is right if it is
    what the target draws with the same noise. The output is the plain loop's, token for token."""

    fixed_rounds = False

    def __init__(self, seeds: Tensor):
        self.noise = SharedNoise(seeds)

    def perturbed(self, scores: Tensor, positions: Tensor) -> Tensor:
        positions = positions.expand(scores.shape[:2])
        return self.noise(positions, scores.shape[-1]).add_(scores)

    def draw(self, scores: Tensor, positions: Tensor) -> Tensor:
        return self.perturbed(scores, positions).argmax(-1)

    def outlook(self, scores: Tensor, positions: Tensor) -> Tensor:
        return self.perturbed(scores, positions)

    def draft_probs(self, scores: Tensor) -> Tensor | None:
        return None

    def candidates(self, scores: Tensor, positions: Tensor, count: int) -> Tensor:
        return self.perturbed(scores, positions).topk(count).indices

    def verify(self, rule: Callable[..., Verdict], draft: Draft, scores: Tensor, positions: Tensor) -> Verdict:
        return greedy_match(draft.tokens, None, self.perturbed(scores, positions))

    def refine(
        self, rule: Callable[..., tuple[Tensor, Tensor]], x: Tensor, q: Tensor | None, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y = self.draw(scores, positions)
        return y, y[:, :-1] == x, None

    def walk(
        self, rule: Callable[..., tuple[Tensor, Tensor, Tensor]], draft: Draft, scores: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return follow(draft, self.draw(scores, positions))


def follow(draft: Draft, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Walk a tree by what the target drew `[B, M+1]` after the committed token and after each node."""
    assert draft.tree is not None
    return walk_deterministic(draft.tokens, draft.tree.parents, drawn, depth=draft.tree.height)


def row_seeds(seed: int | Sequence[int] | None, rows: int, device: torch.device) -> Tensor:
    """One 63-bit seed a row: s gives s, s+1, …; a list is taken as it is; None asks torch's global generator."""
    if seed is None:
        return torch.randint(0, 2**62, (rows,)).to(device)
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else seed
    if not isinstance(seeds, Sequence) or not all(isinstance(s, int) and -(2**63) <= s < 2**63 for s in seeds):
        raise ConfigError(f"seed must be a 64-bit whole number, a list of one a row, or None; got {seed!r}")
    if len(seeds) != rows:
        raise ConfigError(f"seed has {len(seeds)} entries for a batch of {rows} rows; give one a row or a single int")
    return torch.tensor(list(seeds), device=device)


def fit_vocabulary(scores: Tensor, size: int) -> Tensor:
    """Scores over a padded vocabulary `[..., V']` cut, or filled up with -inf, to the target's `size`."""
    if scores.shape[-1] == size:
        return scores
    if scores.shape[-1] > size:
        return scores[..., :size]
    return torch.nn.functional.pad(scores, (0, size - scores.shape[-1]), value=float("-inf"))
