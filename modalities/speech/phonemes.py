"""What a speech language model reads and says: phonemes, and codes between them.

    <s> # ph_1 … ph_n # <speak>   # c c … ph_1 c c c … ph_n c … # c c </s>

Every phoneme is repeated before the codes that speak it, as in ELLA-V (2401.07333): where the voice is in the text is part
of the sequence, a phoneme's duration is when the next one comes. `Interleaved` is the one logits processor that holds any
decoder-only model to this form.
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


@dataclass(frozen=True, slots=True)
class Layout:
    """Token ids: codes are 0 … codes - 1, phonemes (the edge of an utterance first) `first_phoneme` and up."""

    codes: int
    pad: int
    start: int
    speak: int
    end: int
    first_phoneme: int
    size: int

    @classmethod
    def of(cls, tokenizer: Any) -> Layout:
        """The layout of a tokenizer made by `new_tokenizer`; CheckpointError for any other."""
        known = tokenizer.get_vocab()
        named = [known.get(t) for t in (PAD, START, SPEAK, END, EDGE)]
        codes = sum(bool(re.fullmatch(r"<\d+>", t)) for t in known)
        if None in named or named != list(range(codes, codes + 5)):
            raise CheckpointError(
                "the tokenizer has no speech codes; give a folder that polyspec task=train modality=speech wrote"
            )
        return cls(codes, *named, len(known))  # type: ignore[arg-type]


def new_tokenizer(codes: int, alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer of phoneme strings over `alphabet`, with `codes` speech codes before it."""
    names = [*(f"<{i}>" for i in range(codes)), PAD, START, SPEAK, END, EDGE, *alphabet]
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
    """Where rows are: what is to be said, the end last (`[B, P + 1]` or more, the end repeated); and `[B]` each, how many
    phonemes that is, how many have been said, how many codes since the last one, and how many codes in all."""

    prompt: Tensor
    length: Tensor
    spoken: Tensor
    run: Tensor
    codes: Tensor


class Interleaved(LogitsProcessor):
    """Rules out what the form does not allow: behind <speak> and behind codes come codes or the prompt's next phoneme (the
    end, where there is none left), behind a phoneme comes a code.

    Speech cannot run on: a phoneme has at most `longest` codes, and once there are `pace` codes a phoneme of the whole text,
    only one. It looks at the history, and over drafted tokens works out all positions at once.
    """

    def __init__(self, layout: Layout, longest: int = 40, pace: int = 8):
        self.layout, self.longest, self.pace = layout, longest, pace

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        at = self.state(input_ids, lengths)
        allowed = self.allowed(at, at.spoken[:, None], at.run[:, None], at.codes[:, None], scores.shape[-1])[:, 0]
        return scores.masked_fill(~allowed, float("-inf"))

    def over_drafts(
        self, scores: Tensor, sequences: Sequences, drafts: Tensor, tree: Tree | None, first: int
    ) -> Tensor:
        """The same for scores `[B, T, V]` behind drafts, as `Processing.scores` takes them."""
        at = self.state(sequences.tokens, sequences.length_tensor)
        width, count = scores.shape[1], drafts.shape[1]
        if tree is None:
            above = torch.ones(first + width, count, dtype=torch.bool, device=drafts.device).tril(-1)[first:]
            depth = torch.arange(1, count + 1, device=drafts.device)
            own = torch.arange(first, first + width, device=drafts.device)
        else:
            above = tree.ancestors[..., first : first + width, 1:][..., :count].to(drafts.device)
            depth = tree.depth[..., 1:][..., :count].to(drafts.device)
            own = tree.depth[..., first : first + width].to(drafts.device)
        among = (
            above & (drafts >= self.layout.first_phoneme)[:, None]
        )  # [B, T, M]: drafted phonemes before each position
        said = among.sum(-1)
        latest = (among * depth.unsqueeze(-2)).amax(-1) if count else torch.zeros_like(said)
        run = torch.where(latest > 0, own - latest, at.run[:, None] + own)
        codes = at.codes[:, None] + own - said
        return scores.masked_fill(
            ~self.allowed(at, at.spoken[:, None] + said, run, codes, scores.shape[-1]), float("-inf")
        )

    def state(self, ids: Tensor, lengths: Tensor) -> State:
        """Of rows `ids [B, L]`, of which the first `lengths [B]` tokens count."""
        index = torch.arange(ids.shape[1], device=ids.device)
        begin = (ids == self.layout.start).int().argmax(1)
        speak = (ids == self.layout.speak).int().argmax(1)
        here = (index > speak[:, None]) & (index < lengths[:, None]) & (ids >= self.layout.first_phoneme)
        latest = torch.where(here, index, speak[:, None]).amax(1)
        place = begin[:, None] + 1 + index
        prompt = torch.where(place < speak[:, None], ids.gather(1, place.clamp(max=ids.shape[1] - 1)), self.layout.end)
        spoken = here.sum(1)
        return State(prompt, speak - begin - 1, spoken, lengths - 1 - latest, lengths - 1 - speak - spoken)

    def allowed(self, at: State, spoken: Tensor, run: Tensor, codes: Tensor, vocab: int) -> Tensor:
        """`[B, T, V]` where phonemes said, codes since the last and codes in all are `[B, T]`."""
        following = at.prompt.gather(1, spoken.clamp(max=at.prompt.shape[1] - 1))
        in_time = (codes < self.pace * at.length[:, None]) | (run == 0)
        found = torch.zeros(*spoken.shape, vocab, dtype=torch.bool, device=spoken.device)
        found[..., : self.layout.codes] = ((spoken > 0) & (run < self.longest) & in_time)[..., None]
        return found.scatter(-1, following[..., None], ((spoken == 0) | (run > 0))[..., None])

    def most(self, prompt: int) -> int:
        """Tokens that may follow a prompt of `prompt` tokens."""
        return (self.pace + 2) * prompt


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
