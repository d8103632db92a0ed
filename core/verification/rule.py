"""What every acceptance rule returns, and the label each of them carries.

A rule is a pure function of tensors. `@rule` states what its output is guaranteed to be:

* `exact`        the emitted tokens have the target's distribution;
* `bounded`      a bound, given in the rule's docstring, holds for every drafted token;
* `group-exact`  exact over groups of tokens;
* `heuristic`    no guarantee: quality has to be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor

from polyspec.errors import UnsupportedModelError

GUARANTEES = ("exact", "bounded", "group-exact", "heuristic")

Args = ParamSpec("Args")
Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Row b keeps its first `accepted[b]` drafted tokens and then emits `next_token[b]`.

    For one-step rules over K candidates, `accepted[b]` is 1 + the index of the accepted candidate (0: none)
    and `next_token[b]` is the emitted token itself, whether or not it was a candidate.
    """

    accepted: Tensor  # [B] long
    next_token: Tensor  # [B] long


@dataclass(frozen=True, slots=True)
class LatentVerdict:
    """On N drafted continuous tokens: row b keeps its first `accepted[b]`. Denoising of the token behind them goes on from
    `start[b]`, which `steps[b]` denoising steps have led to (0: from fresh noise, whatever `start` holds)."""

    accepted: Tensor  # [B] long
    steps: Tensor  # [B] long
    start: Tensor  # [B, D]
    kept: Tensor  # [B, N, T] bool, which steps would hold, each taken on its own
    chance: Tensor  # [B, N, T], the probability that each holds where it starts; the most an exact rule reaches is 1 - TV


class Rule(Protocol[Args, Result]):
    """A rule with its label, its paper (arXiv id) and the rule that replaces it at temperature 0."""

    __name__: str
    guarantee: str
    paper: str
    greedy: Callable[..., Any]
    takes: tuple[str, ...]
    certain: bool

    def __call__(self, *args: Args.args, **kwargs: Args.kwargs) -> Result: ...


def rule(
    *,
    guarantee: str,
    paper: str,
    greedy: Callable[..., Any] | None = None,
    takes: tuple[str, ...] = (),
    certain: bool = False,
) -> Callable[[Callable[Args, Result]], Rule[Args, Result]]:
    """Label a function as an acceptance rule; `greedy=None` means that it is its own greedy rule.

    takes: what it needs of the target beside probabilities, as attributes of the Target; `for_target` hands them over
    as keyword arguments of the same names. certain: whether, as a tree's walk, it also judges nodes that were not drawn
    (node_q None); for other walks the target's own draw at a node picks its child.
    """
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee must be one of {GUARANTEES}, not {guarantee!r}")

    def label(function: Callable[Args, Result]) -> Rule[Args, Result]:
        labelled: Any = function
        labelled.guarantee = guarantee
        labelled.paper = paper
        labelled.greedy = function if greedy is None else greedy
        labelled.takes = takes
        labelled.certain = certain
        return cast("Rule[Args, Result]", labelled)

    return label


def for_target(form: Callable[..., Any], target: Any) -> Callable[..., Any]:
    """`form`, a rule or a partial of one, with what it takes of `target` filled in, where the caller gave nothing.

    Raises UnsupportedModelError if the target has no such thing.
    """
    labelled, given = getattr(form, "func", form), getattr(form, "keywords", {})
    found = {}
    for name in getattr(labelled, "takes", ()):
        if given.get(name) is None:
            found[name] = getattr(target, name, None)
            if found[name] is None:
                raise UnsupportedModelError(
                    f"{labelled.__name__} needs the target's {name}, and {type(target.model).__name__} has none; "
                    f"choose another recipe, or give {name}=… to the rule"
                )
    return partial(form, **found) if found else form
