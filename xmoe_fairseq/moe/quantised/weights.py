"""Float matrices to int8 with one scale per output channel, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..native.rows import Int8Weights

LARGEST = 127


def quantise_channels(w_EOI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (E, O, I) in -127 .. 127 and its float32 (E, O) scales, the largest magnitude of a channel over 127.

    Raises:
        ValueError: a NaN or an infinity.
    """
    w_EOI = w_EOI.detach().float()
    largest_EO = w_EOI.abs().amax(dim=-1)
    if not torch.isfinite(largest_EO).all():
        raise ValueError("the weights hold NaN or infinity, which int8 cannot; take a sound checkpoint")
    scale_EO = largest_EO / LARGEST
    inverse_EO = torch.where(scale_EO > torch.finfo(torch.float32).tiny, 1.0 / scale_EO, 0.0)
    return (w_EOI * inverse_EO.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale_EO


def dequantise(q_EOI: Tensor, scale_EO: Tensor) -> Tensor:
    """The float32 matrices that the int8 ones stand for."""
    return q_EOI.float() * scale_EO.unsqueeze(-1)


def with_sums(q_EOI: Tensor, scale_EO: Tensor, bias_EO: Tensor | None) -> Int8Weights:
    """The arguments of the kernels, with the sums of the channels."""
    return Int8Weights(q_EOI, scale_EO, q_EOI.sum(dim=-1, dtype=torch.int32), bias_EO)


class StoredNumbers(nn.Module):
    """A module whose buffers ``.to(device)`` moves, while ``.half()`` and ``.bfloat16()`` leave them as stored."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self
