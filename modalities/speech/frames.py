"""Speech in frames: models that say several codes, one a codebook, at each step in time.

To the loops such a model is a decoder like any other: its tokens are the codes one by one, a frame after the other,
K a frame. Here the backbone, which runs over time and takes a whole frame at a position, is told apart from what gives
the codes within one. `FrameTarget` keeps the codes it was fed and the backbone's states; so drafts may end anywhere in
a frame, and a rollback stays a change of one number a row.

`ColumnTarget` is for models whose codes of a frame do not depend on each other (delayed columns): one state gives all K,
so the loops are told to take them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from polyspec.attention import grouped
from polyspec.decoding.sequences import Sequences
from polyspec.errors import InputError
from polyspec.target import Output, Target


class FrameTarget(Target):
    """Tokens 0 … V-1 are codes, V + i is the model's i-th text token; the prompt is text, behind it come frames only.

    A subclass gives `call`, which turns backbone inputs `[S, T, K]` (frames; a text token stands first in its place) or
    a prompt `[S, T]` into states `[S, T, d]`, its "logits", and `within`.
    """

    one_pass = False
    elsewhere = 'polyspec.pipeline("speech", target=(model, processor), recipe=…)'
    frame: int
    """Codes in a frame, K."""
    codes: int
    """Codes in a codebook, V."""
    texts: int
    """Text tokens."""

    model: Any

    @property
    def vocab_size(self) -> int:
        return self.codes

    @property
    def input_size(self) -> int:
        return self.codes + self.texts

    @property
    def cache_lengths(self) -> list[int]:
        return self.kept

    def within(self, first: Sequence[int], width: int, end: Sequence[int]) -> Tensor:
        """Logits `[B, width, K, V]` of the codes of `width` frames from frame `first[b]` on. Only those of what was not
        kept are looked at, up to code `end[b]` of the row, counted from the first frame's first."""
        raise NotImplementedError

    def prefill(self, tokens: Tensor, mask: Tensor | None = None, *, capacity: int, **rest: Any) -> Output | None:
        frames = max(capacity - tokens.shape[1], 0) // self.frame + 2
        output = super().prefill(tokens, mask, capacity=tokens.shape[1] + frames, **rest)
        # one column more than can be filled: where goes what belongs to no frame
        self.said = tokens.new_zeros(self.rows, frames * self.frame + 1)
        self.states: Tensor | None = None
        self.begun = self.prompt_lengths[: self.rows]
        self.kept = [n - 1 for n in self.begun]
        return output

    def rollback(self, lengths: Sequence[int], running: Sequence[bool] | None = None) -> None:
        assert self.cache is not None
        self.kept = list(lengths)
        self.cache.rollback(self.slots(self.kept) * (self.streams // self.rows))

    def slots(self, lengths: Sequence[int]) -> list[int]:
        """How many places of the backbone's cache each row's first `lengths[b]` tokens fill."""
        return [min(n, p) + max(n - p, 0) // self.frame for n, p in zip(lengths, self.begun, strict=True)]

    @torch.no_grad()
    def forward(self, tokens: Tensor, tree: Any = None, wanted: int = 0) -> Output:
        assert tree is None
        count, room = tokens.shape[1], self.said.shape[1] - 1
        start = [n - p for n, p in zip(self.kept, self.begun, strict=True)]  # codes said before these, -1: none, and
        at = torch.tensor(start, device=tokens.device)[:, None] + torch.arange(count, device=tokens.device)
        where = torch.where(at < 0, room, at).clamp(max=room)
        self.said.scatter_(1, where, tokens.clamp(0, self.codes - 1))
        self.advance(count)
        skip = count - wanted if wanted else 0
        first = [max(n + skip + 1, 0) // self.frame for n in start]  # of the codes that follow, where the first one is
        end = [max(n + count, 0) for n in start]
        width = max(n // self.frame - f for n, f in zip(end, first, strict=True)) + 1
        offset = [f * self.frame for f in first]
        until = [n - o for n, o in zip(end, offset, strict=True)]
        logits = self.within(first, width, until).flatten(1, 2)
        index = (at[:, skip:] + 1 - torch.tensor(offset, device=tokens.device)[:, None]).clamp(0, logits.shape[1] - 1)
        logits = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[2]))
        return Output(logits)

    def advance(self, count: int) -> None:
        """Run the backbone over the frames that `count` more tokens a row complete."""
        begin, end = self.slots(self.kept), self.slots([n + count for n in self.kept])
        width = max(e - b for b, e in zip(begin, end, strict=True))
        if width == 0:
            return
        device = self.said.device
        slot = torch.tensor(begin, device=device)[:, None] + torch.arange(width, device=device)
        frame = slot - torch.tensor(self.begun, device=device)[:, None]  # negative: a token of the prompt
        columns = self.frames(frame)
        text = self.prompts[: self.rows].gather(1, slot.clamp(max=self.prompts.shape[1] - 1))
        columns[..., 0] = torch.where(frame < 0, text, columns[..., 0])
        copies = self.streams // self.rows
        columns = columns.repeat(copies, 1, 1)
        slots, mask = self.layout(width, None, device)
        with grouped(self.config):
            states, _ = self.call(columns, slots, mask, keep_logits=True)
        assert states is not None
        kept = self.states
        if kept is None:
            kept = states.new_zeros(self.streams, self.said.shape[1] // self.frame + 2, states.shape[2])
        last = kept.shape[1] - 1
        index = torch.where(frame < -1, last, frame + 1).clamp(max=last).repeat(copies, 1)
        self.states = kept.scatter_(1, index[..., None].expand(-1, -1, states.shape[2]), states)

    def frames(self, index: Tensor) -> Tensor:
        """The codes `[B, W, K]` of the frames `index [B, W]`; those that are not there are arbitrary."""
        known = self.said[:, :-1].unflatten(1, (-1, self.frame))
        index = index.clamp(0, known.shape[1] - 1)
        return known.gather(1, index[..., None].expand(-1, -1, self.frame))

    def states_before(self, first: Sequence[int], width: int) -> Tensor:
        """The states `[S, W, d]` that the frames from `first[b]` on are said from."""
        assert self.states is not None
        start = torch.tensor(first, device=self.states.device)[:, None]
        index = (start + torch.arange(width, device=start.device)).clamp(max=self.states.shape[1] - 1)
        index = index.repeat(self.streams // self.rows, 1)
        return self.states.gather(1, index[..., None].expand(-1, -1, self.states.shape[2]))


class ColumnTarget(FrameTarget):
    """Codes of a frame do not depend on each other. A subclass gives `heads`."""

    @property
    def step(self) -> int:  # type: ignore[override]
        return self.frame

    def heads(self, states: Tensor) -> Tensor:
        """States `[S, W, d]` to logits `[B, W, K, V]`, guided."""
        raise NotImplementedError

    def within(self, first: Sequence[int], width: int, end: Sequence[int]) -> Tensor:
        return self.heads(self.states_before(first, width))


def said_with(sequences: Sequences, drafts: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """For processors of delayed columns: all codes said `[B, G]`, drafts included, -1 where there are none, and which of
    them the `width` positions from the `first` drafted one on are `[B, width]`."""
    begin = (sequences.length_tensor - sequences.prompt_length)[:, None]
    said = torch.nn.functional.pad(sequences.tokens[:, sequences.prompt_length :], (0, drafts.shape[1]))
    said = said.scatter(1, begin + torch.arange(drafts.shape[1], device=said.device), drafts)
    there = torch.arange(said.shape[1], device=said.device) < begin + drafts.shape[1]
    return said.where(there, -1), begin + torch.arange(first, first + width, device=said.device)


def force(scores: Tensor, forced: Tensor) -> Tensor:
    """`scores [B, T, V]` where the token `forced [B, T]` is the only one allowed; -1: nothing is changed."""
    others = torch.arange(scores.shape[2], device=scores.device) != forced[..., None]
    certain = torch.zeros_like(scores).masked_fill(others, float("-inf"))
    return torch.where((forced >= 0)[..., None], certain, scores)


class WholeVoice:
    """Collects codes and turns them into sound at the end: a codec of transformers need not give in pieces what it gives
    whole. wave: frames `[T, K]`, T ≥ 1, to samples `[N]`."""

    def __init__(self, frame: int, wave: Callable[[Tensor], Tensor]):
        self.frame, self.wave = frame, wave
        self.codes: list[int] = []

    @torch.no_grad()
    def push(self, tokens: Sequence[int], last: bool = False) -> Tensor:
        self.codes += tokens
        whole = len(self.codes) // self.frame * self.frame
        if not last or not whole:
            return torch.zeros(0)
        return self.wave(torch.tensor(self.codes[:whole]).view(-1, self.frame)).float().cpu()


class FramedSpeech:
    """Base of the text-to-speech models of transformers that say frames, behind what the pipeline asks of a model: see
    `polyspec.modalities.speech.target.SpeechModel`.

    processor: the model's own. Raises InputError for a text that leaves no room for speech.
    """

    loads: ClassVar[str]
    """The transformers class of a checkpoint."""
    speaks: ClassVar[type[FrameTarget]]
    prompt = "{text}"
    """What the model reads, for a text."""
    reading: Mapping[str, Any] = MappingProxyType({})
    """How the processor takes it."""
    most = 2048
    """Frames, at most."""
    sample_rate: int
    eos: Tensor | None = None

    def __init__(self, model: PreTrainedModel, processor: Any):
        self.model: Any = model
        self.processor = processor
        self.parts = (model, processor)
        self.target = self.speaks(model)

    def pieces(self, text: str) -> list[str]:
        return [text]

    def inputs(self, found: Sequence[str]) -> Any:
        """What the model's own `generate` takes."""
        texts = [self.prompt.format(text=text) for text in found]
        return self.processor(text=texts, padding=True, return_tensors="pt", **self.reading).to(self.model.device)

    def encode(self, found: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        inputs = self.inputs(found)
        return inputs["input_ids"] + self.target.codes, inputs["attention_mask"], self.room(inputs) * self.target.frame

    def room(self, inputs: Any) -> int:
        """How many frames may follow."""
        prompt = inputs["input_ids"].shape[1]
        room = min(self.target.config.max_position_embeddings - prompt, self.most)
        if room < 1:
            raise InputError(f"a text of {prompt} tokens leaves no room for speech; give a shorter one")
        return room

    def processors(self, knobs: Mapping[str, Any]) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
        return [], []

    def constraint(self, limit: int) -> None:
        return None

    def stops(self, prompt: int) -> list[Callable[[Tensor, None], Tensor]]:
        """When a row `[1, L]` has ended, `prompt` of whose tokens are text."""

        def stop(row: Tensor, _: None) -> Tensor:
            said = row.shape[1] - prompt
            over = said > 0 and said % self.target.frame == 0 and self.ends(row[0, -self.target.frame :])
            return torch.tensor([over])

        return [stop]

    def ends(self, frame: Tensor) -> bool:
        """Whether speech ends with `frame [K]`."""
        raise NotImplementedError

    def voice(self) -> WholeVoice:
        return WholeVoice(self.target.frame, self.wave)

    def wave(self, frames: Tensor) -> Tensor:
        """Frames `[T, K]`, the last of which may be the end, to samples."""
        raise NotImplementedError

    def generate(self, found: Sequence[str], **knobs: Any) -> list[list[int]]:
        """New tokens of each piece as the model's own `generate` draws them, the end included."""
        inputs = self.inputs(found)
        frames = self.own(inputs, self.room(inputs), knobs).tolist()
        return [[c for frame in until(row, lambda f: self.ends(torch.tensor(f))) for c in frame] for row in frames]

    def own(self, inputs: Any, frames: int, knobs: dict[str, Any]) -> Tensor:
        """At most `frames` new frames `[B, T, K]`."""
        return self.model.generate(**inputs, max_new_tokens=frames, **knobs)


def until(found: Sequence[Any], last: Callable[[Any], bool]) -> list[Any]:
    """The beginning of `found` up to the first that is the `last`, it included."""
    kept = []
    for one in found:
        kept.append(one)
        if last(one):
            break
    return kept
