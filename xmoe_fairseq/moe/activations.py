"""Activation functions with the derivative that the hand-written backward of the experts needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """``forward(pre)`` and ``backward(grad, pre)``: gradient with respect to ``pre``; any shape, same dtype."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda pre: torch.nn.functional.gelu(pre, approximate=approximate),
        lambda grad, pre: torch.ops.aten.gelu_backward(grad, pre, approximate=approximate),
    )


_SILU = Activation(torch.nn.functional.silu, lambda grad, pre: torch.ops.aten.silu_backward(grad, pre))

# The names are those of fairseq's --activation-fn.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu("none"),
    "gelu_fast": _gelu("tanh"),
    "gelu_accurate": _gelu("tanh"),
    "relu": Activation(torch.relu, lambda grad, pre: torch.ops.aten.threshold_backward(grad, pre, 0)),
    "silu": _SILU,
    "swish": _SILU,
}
