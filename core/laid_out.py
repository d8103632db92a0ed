"""Linear layers whose bfloat16 matrices are laid out for the processor once.

A processor with bfloat16 instructions wants a matrix in blocks. torch keeps it in rows and puts it into blocks in every
call, which for the few rows of a decoding step costs more than the product: half to two thirds of the time. Here the blocks
are made once and kept beside the weights as long as these do not change. Values are the same up to rounding.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

T = TypeVar("T")
Linear = Callable[[Tensor], Tensor]
Layers = Sequence[tuple[nn.Module, Linear]]

ROWS = 64  # what blocks are made for; those for one row are slow for thousands
FEW = 256  # rows above which the product itself is what takes the time
SHARE = 4  # blocks are kept if they take at most this part of the machine's memory

_DERIVED: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def derived(module: nn.Module, name: str, make: Callable[[], T], *others: Tensor) -> T:
    """`make()`, something computed from the weights of `module` and from `others`, kept until one of them changes.

    It must not refer to `module` itself, or neither is ever freed."""
    sources = (*module.parameters(), *others)
    state = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in sources]
    found = _DERIVED.setdefault(module, {})
    if name not in found or found[name][0] != state:
        found[name] = state, make()
    return found[name][1]


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """x `[.., d]` to `weight x + bias` `[.., d']`, without gradients."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and lays_out():
        ready = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ready, bias, "none", [], "")
    return lambda x: functional.linear(x, weight, bias)


def lays_out() -> bool:
    """Whether this torch and this processor can multiply by a bfloat16 matrix that was laid out before."""
    ops: Any = torch.ops.mkldnn
    known = all(hasattr(ops, n) for n in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"))
    return torch.backends.mkldnn.is_available() and known and ops._is_mkldnn_bf16_supported()


def laid_out(model: nn.Module) -> Layers:
    """The linear layers of `model` whose matrices are worth laying out, each with its forward; [] where none is: on other
    devices, in other dtypes, with too little memory. Layers of other classes, or whose forward somebody has replaced, are
    left alone."""
    if not lays_out():
        return []
    layers = [
        m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m) and plain_matrix(m.weight)
    ]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    if SHARE * sum(m.weight.nbytes for m in layers) > memory:
        return []
    return [(m, derived(m, "laid_out", lambda m=m: forward_of(m.weight, m.bias))) for m in layers]


def plain_matrix(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and type(weight) in (Tensor, nn.Parameter)


def forward_of(weight: Tensor, bias: Tensor | None) -> Linear:
    """A linear layer's forward that takes few rows to the blocks and everything else, training too, to the matrix."""
    few = linear(weight, bias)
    width = weight.shape[1]

    def forward(input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16 or input.numel() > FEW * width or torch.is_grad_enabled():
            return functional.linear(input, weight, bias)
        return few(input)

    return forward


@contextmanager
def using(layers: Layers) -> Iterator[None]:
    """Within, these layers (of `laid_out`) are called by their new forwards. Whoever else calls them meanwhile gets the same
    values."""
    for module, forward in layers:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in layers:
            module.__dict__.pop("forward", None)
