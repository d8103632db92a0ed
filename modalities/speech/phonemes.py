"""What a speech language model reads and says: phonemes, and codes between them.

    <s> # ph_1 … ph_n # <speak>   #:2 c c ph_1:3 c c c … ph_n:1 c #:2 c c </s>

Every phoneme is repeated before the codes that speak it, as in ELLA-V (2401.07333): where the voice is in the text is part
of the sequence. It comes with its duration, so that speech can neither run on nor stop early, and which of the next tokens
are codes is known beforehand. `Interleaved` is the one logits processor that holds any decoder-only model to this form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from polyspec.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from polyspec.decoding.sequences import Sequences
    from polyspec.trees import Tree

PAD, START, SPEAK, END, EDGE = "<pad>", "<s>", "<speak>", "</s>", "#"
LONGEST = 90
"""Phonemes in a piece of text that is spoken at once."""
DURATIONS = 16
"""Codes that one phoneme may take: what the voice learnt from never exceeds."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Token ids: codes are 0 … codes - 1, the text's `phonemes` (the edge of an utterance first) `first_phoneme` and up,
    spoken ones `first_spoken` and up: phoneme p with d codes, 1 … durations, is first_spoken + p · durations + d - 1."""

    codes: int
    pad: int
    start: int
    speak: int
    end: int
    first_phoneme: int
    phonemes: int
    durations: int

    @property
    def first_spoken(self) -> int:
        return self.first_phoneme + self.phonemes

    @property
    def size(self) -> int:
        return self.first_spoken + self.phonemes * self.durations

    def duration(self, token: Any) -> Any:
        """How many codes spoken phonemes take; of other tokens, anything."""
        return (token - self.first_spoken) % self.durations + 1

    @classmethod
    def of(cls, tokenizer: Any) -> Layout:
        """The layout of a tokenizer made by `new_tokenizer`; CheckpointError for any other."""
        known = tokenizer.get_vocab()
        named = [known.get(t) for t in (PAD, START, SPEAK, END, EDGE)]
        codes = sum(bool(re.fullmatch(r"<\d+>", t)) for t in known)
        durations = sum(bool(re.fullmatch(rf"{EDGE}:\d+", t)) for t in known)
        if None in named or named != list(range(codes, codes + 5)) or not durations:
            raise CheckpointError(
                "the tokenizer has no speech codes, or no phonemes with durations; give a folder that polyspec task=train "
                "modality=speech wrote, with this version"
            )
        phonemes = sum(len(t) == 1 for t in known)
        return cls(codes, *named, phonemes, durations)  # type: ignore[arg-type]


def new_tokenizer(codes: int, alphabet: str, durations: int = DURATIONS) -> PreTrainedTokenizerFast:
    """A tokenizer of phoneme strings over `alphabet`, with `codes` speech codes before it, and spoken phonemes behind."""
    phonemes = [EDGE, *alphabet]
    spoken = [f"{name}:{d}" for name in phonemes for d in range(1, durations + 1)]
    names = [*(f"<{i}>" for i in range(codes)), PAD, START, SPEAK, END, *phonemes, *spoken]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[attr-defined]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single=f"{START} {EDGE} $A {EDGE} {SPEAK}", special_tokens=[(t, vocabulary[t]) for t in (START, EDGE, SPEAK)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, padding_side="left"
    )


class State(NamedTuple):
    """Where rows are: the phonemes to be said (`[B, P]`, counted from 0), and `[B]` each, how many those are, how many have
    been said, and how many codes the last of them still lacks."""

    prompt: Tensor
    length: Tensor
    spoken: Tensor
    lacks: Tensor


class Followed:
    """Where the rows of `sequences` are, kept up on the host, where their tokens come by anyway: only what is new is read."""

    def __init__(self, layout: Layout, sequences: Sequences):
        self.layout, self.sequences = layout, sequences
        heads = [row[row.index(layout.start) + 1 : row.index(layout.speak)] for row in sequences.history]
        self.read = [row.index(layout.speak) + 1 for row in sequences.history]
        self.spoken, self.lacks = [0] * len(heads), [0] * len(heads)
        longest = max(map(len, heads))
        padded = [[t - layout.first_phoneme for t in head] + [0] * (longest - len(head)) for head in heads]
        device = sequences.device
        self.known = State(
            torch.tensor(padded, device=device),
            torch.tensor([len(head) for head in heads], device=device),
            *(torch.zeros(len(heads), dtype=torch.long, device=device) for _ in range(2)),
        )

    def state(self) -> State:
        changed = False
        for row, tokens in enumerate(self.sequences.history):
            for token in tokens[self.read[row] :]:
                if token >= self.layout.first_spoken:
                    self.spoken[row] += 1
                    self.lacks[row] = self.layout.duration(token)
                else:
                    self.lacks[row] -= 1
                changed = True
            self.read[row] = len(tokens)
        if changed:
            spoken, lacks = torch.tensor([self.spoken, self.lacks], device=self.sequences.device)
            self.known = self.known._replace(spoken=spoken, lacks=lacks)
        return self.known


class Interleaved(LogitsProcessor):
    """Rules out what the form does not allow: behind a phoneme come as many codes as it lasts, then the prompt's next
    phoneme, with any duration, or the end, where none is left.

    It looks at the history, and over drafted tokens works out all positions at once.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        # what is ruled out, [2 + phonemes, V]: where a code has to come, where each of the phonemes, where the end
        self.barred = torch.ones(2 + layout.phonemes, layout.size, dtype=torch.bool)
        self.barred[0, : layout.codes] = False
        spoken = torch.arange(layout.phonemes)[:, None] * layout.durations + torch.arange(layout.durations)
        self.barred[1:-1].scatter_(1, layout.first_spoken + spoken, False)
        self.barred[-1, layout.end] = False
        self.followed: Followed | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        at = self.state(input_ids)
        return self.bar(scores[:, None], at, at.spoken[:, None], at.lacks[:, None])[:, 0]

    def over_drafts(
        self, scores: Tensor, sequences: Sequences, drafts: Tensor, tree: Tree | None, first: int
    ) -> Tensor:
        """The same for scores `[B, T, V]` behind drafts, as `Processing.scores` takes them."""
        followed = self.followed
        if followed is None or followed.sequences is not sequences:  # another run, of another thread perhaps
            followed = self.followed = Followed(self.layout, sequences)
        at = followed.state()
        width, count = scores.shape[1], drafts.shape[1]
        if tree is None:
            own = torch.arange(first, first + width, device=drafts.device)
        else:
            own = tree.depth[..., first : first + width].to(drafts.device)
        said, lacks = at.spoken[:, None], at.lacks[:, None] - own
        if count:
            if tree is None:
                depth = torch.arange(1, count + 1, device=drafts.device)
                above = own[:, None] >= depth
            else:
                above = tree.ancestors[..., first : first + width, 1:][..., :count].to(drafts.device)
                depth = tree.depth[..., 1:][..., :count].to(drafts.device)
            # [B, T, M]: drafted phonemes before each position, of which the deepest is the latest
            among = above & (drafts >= self.layout.first_spoken)[:, None]
            latest, which = (among * depth.unsqueeze(-2)).max(-1)
            lasts = self.layout.duration(drafts).gather(1, which.flatten(1)).view_as(which)
            said, lacks = said + among.sum(-1), torch.where(latest > 0, lasts - (own - latest), lacks)
        return self.bar(scores, at, said.expand_as(lacks), lacks)

    def state(self, ids: Tensor) -> State:
        """Of rows `ids [B, L]`."""
        index = torch.arange(ids.shape[1], device=ids.device)
        begin = (ids == self.layout.start).int().argmax(1)
        speak = (ids == self.layout.speak).int().argmax(1)
        here = (index > speak[:, None]) & (ids >= self.layout.first_spoken)
        latest = (here * index).amax(1)
        place = (begin[:, None] + 1 + index).clamp(max=ids.shape[1] - 1)
        prompt = (ids.gather(1, place) - self.layout.first_phoneme).clamp(0, self.layout.phonemes - 1)
        lasts = self.layout.duration(ids.gather(1, latest[:, None])[:, 0])
        lacks = torch.where(latest > 0, lasts - (ids.shape[1] - 1 - latest), 0)
        return State(prompt, speak - begin - 1, here.sum(1), lacks)

    def bar(self, scores: Tensor, at: State, spoken: Tensor, lacks: Tensor) -> Tensor:
        """Scores `[B, T, V]` where phonemes said and codes that the last of them lacks are `[B, T]`."""
        following = 1 + at.prompt.gather(1, spoken.clamp(max=at.prompt.shape[1] - 1))
        following = torch.where(spoken < at.length[:, None], following, len(self.barred) - 1)
        self.barred = self.barred.to(scores.device)
        return scores.masked_fill(self.barred[torch.where(lacks > 0, 0, following)], float("-inf"))

    def most(self, prompt: int) -> int:
        """Tokens that may follow a prompt of `prompt` tokens."""
        return (self.layout.durations + 1) * prompt


@cache
def phonemiser() -> Any:
    """hibari-tts, whose phonemiser and voice the sample has learnt from; ConfigError if it is not installed."""
    try:
        from hibari import Hibari
    except ImportError as error:
        raise ConfigError('speech needs hibari-tts for its phonemes; pip install "polyspec[speech]"') from error
    return Hibari()


def alphabet() -> str:
    """All characters that the phonemiser writes."""
    return "".join(phonemiser().vocab)


def pieces(text: str, known: set[str], longest: int = LONGEST) -> list[str]:
    """Phoneme strings of `text`, sentence by sentence, long ones cut at clauses and, if they must, at words.

    InputError if nothing of it can be spoken.
    """
    found = []
    for sentence in phonemiser().phonemize(text):
        kept = "".join(c for c in sentence if c in known).strip()
        while len(kept) > longest:
            cut = max((m.end() for m in re.finditer(r"[,;:—] ", kept[:longest])), default=0)
            cut = cut if cut > longest // 3 else kept.rfind(" ", 1, longest) + 1
            cut = cut or longest
            found.append(kept[:cut].strip())
            kept = kept[cut:].strip()
        found.append(kept)
    found = [p for p in found if re.search(r"\w", p)]
    if not found:
        raise InputError(f"nothing in {text[:40]!r} can be spoken; give words of English text")
    return found
