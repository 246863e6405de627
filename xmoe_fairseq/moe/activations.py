"""Activation functions with the derivative that the hand-written backward of the experts needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """One activation function; tensors of any shape and of one dtype.

    Attributes:
        forward: ``forward(pre)``.
        forward_into: ``forward_into(pre, out)`` writes it to ``out``, which may be ``pre``.
        backward_: ``backward_(grad, pre)`` overwrites ``grad`` with the gradient with respect to ``pre``.
    """

    forward: Callable[[Tensor], Tensor]
    forward_into: Callable[[Tensor, Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten


def _gelu(approximate: str) -> Activation:
    kind = {"approximate": approximate}
    return Activation(
        lambda pre: torch.nn.functional.gelu(pre, approximate=approximate),
        lambda pre, out: _aten.gelu.out(pre, **kind, out=out),
        lambda grad, pre: _aten.gelu_backward.grad_input(grad, pre, **kind, grad_input=grad),
    )


_RELU = Activation(
    torch.relu,
    lambda pre, out: _aten.relu.out(pre, out=out),
    lambda grad, pre: _aten.threshold_backward.grad_input(grad, pre, 0, grad_input=grad),
)
_SILU = Activation(
    torch.nn.functional.silu,
    lambda pre, out: _aten.silu.out(pre, out=out),
    lambda grad, pre: _aten.silu_backward.grad_input(grad, pre, grad_input=grad),
)

# The names are those of fairseq's --activation-fn.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu("none"),
    "gelu_fast": _gelu("tanh"),
    "gelu_accurate": _gelu("tanh"),
    "relu": _RELU,
    "silu": _SILU,
    "swish": _SILU,
}
