"""Hidden states of a few of a model's layers, taken as they pass.

transformers' `output_hidden_states` holds those of every layer until a call returns: of 31 layers, where a drafter reads
three, of all of a batch's prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

HOMES = ("layers", "h")  # what decoders call the list of their layers


def decoder_of(model: PreTrainedModel, depth: int) -> tuple[nn.Module, nn.ModuleList] | None:
    """The decoder of `depth` layers inside a model, which returns a `last_hidden_state`, and these; None if it is not
    built that way."""
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    for name in HOMES:
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers) == depth:
            return decoder, layers
    return None


@contextmanager
def tapped(model: PreTrainedModel, wanted: Sequence[int], depth: int) -> Iterator[dict[int, Tensor] | None]:
    """A dictionary that a call of the model inside the block fills with hidden states `[S, T, d]` by number, as
    `output_hidden_states` numbers them: 0 is what the first layer reads, n what n layers make of it, and `depth` the
    decoder's last, normalised. None: they have to be asked for, or none are `wanted`."""
    place = decoder_of(model, depth) if wanted else None
    if place is None:
        yield None
        return
    decoder, layers = place
    found: dict[int, Tensor] = {}

    def reads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0] = args[0] if args else kwargs["hidden_states"]

    def gives(number: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[number] = output if isinstance(output, Tensor) else output[0]

        return note

    hooks = [layers[n - 1].register_forward_hook(gives(n)) for n in set(wanted) if 0 < n < depth]
    if 0 in wanted:
        hooks.append(layers[0].register_forward_pre_hook(reads, with_kwargs=True))
    if depth in wanted:
        hooks.append(decoder.register_forward_hook(gives(depth)))  # its first field is `last_hidden_state`
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
