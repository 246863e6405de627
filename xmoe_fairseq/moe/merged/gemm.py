"""Merge matrices, and multiply each sentence with its own merged matrix.

The merged matrices of a sentence are 2 x D x F numbers. They are computed for a chunk of at most ``CHUNK_NUMBERS``
numbers at a time and computed again in the backward pass, so that an update holds one chunk and its gradient, however
many sentences it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gate import GateChoice

# Largest count of merged numbers that exist at one time, per bank: 64 MiB in float32, 32 sentences of 512 x 1024.
CHUNK_NUMBERS = 2**24


def merged_linear(x_BTI: Tensor, choice: GateChoice, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
    """Each sentence times its own merged matrix, plus its own merged bias: (B, T, O), dtype of ``x_BTI``."""
    y: Tensor = _MergedLinear.apply(x_BTI, choice.gate_BK, choice.expert_BK, weight_EIO, bias_EO)
    return y


class _MergedLinear(torch.autograd.Function):
    """``x[b] @ merged[b] + merged_bias[b]``; both passes merge chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, gate_BK: Tensor, expert_BK: Tensor, weight_EIO: Tensor, bias_EO: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BTI, gate_BK, expert_BK, weight_EIO, bias_EO)
        y_BTO = x_BTI.new_empty(*x_BTI.shape[:2], weight_EIO.size(-1))
        for chunk in _chunks(x_BTI.size(0), weight_EIO):
            merged_MIO = merge(weight_EIO, gate_BK[chunk], expert_BK[chunk]).to(x_BTI.dtype)
            bias_MO = merge(bias_EO, gate_BK[chunk], expert_BK[chunk]).to(x_BTI.dtype)
            y_BTO[chunk] = torch.baddbmm(bias_MO.unsqueeze(1), x_BTI[chunk], merged_MIO)
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, gate_BK, expert_BK, weight_EIO, bias_EO = ctx.saved_tensors
        weight_EX = weight_EIO.flatten(1)
        grad_x, grad_gate_BK = torch.empty_like(x_BTI), torch.empty_like(gate_BK)
        grad_weight_EX, grad_bias_EO = torch.zeros_like(weight_EX), torch.zeros_like(bias_EO)
        for chunk in _chunks(x_BTI.size(0), weight_EIO):
            gate_MK, expert_MK, grad_MTO = gate_BK[chunk], expert_BK[chunk], grad_BTO[chunk]
            merged_MIO = merge(weight_EIO, gate_MK, expert_MK).to(x_BTI.dtype)
            grad_x[chunk] = torch.bmm(grad_MTO, merged_MIO.transpose(1, 2))
            del merged_MIO
            grad_merged_MX = torch.bmm(x_BTI[chunk].transpose(1, 2), grad_MTO).flatten(1).to(weight_EX.dtype)
            grad_merged_bias_MO = grad_MTO.sum(dim=1).to(bias_EO.dtype)
            weight_ME = _dense_gates(gate_MK, expert_MK, weight_EX)
            grad_weight_EX.addmm_(weight_ME.t(), grad_merged_MX)
            grad_bias_EO.addmm_(weight_ME.t(), grad_merged_bias_MO)
            grad_ME = grad_merged_MX @ weight_EX.t() + grad_merged_bias_MO @ bias_EO.t()
            grad_gate_BK[chunk] = grad_ME.gather(1, expert_MK).to(gate_BK.dtype)
        return grad_x, grad_gate_BK, None, grad_weight_EX.view_as(weight_EIO), grad_bias_EO


def merge(bank: Tensor, gate_BK: Tensor, expert_BK: Tensor) -> Tensor:
    """Gated sum of the chosen experts' tensors: (E, ...) -> (B, ...), in the dtype of ``bank``.

    A lookup sums the chosen ones; if they are half of all or more, one GEMM over all is cheaper.
    """
    flat_EX = bank.flatten(1)
    if 2 * expert_BK.size(1) < flat_EX.size(0):
        gates = gate_BK.to(flat_EX.dtype)
        merged = nn.functional.embedding_bag(expert_BK, flat_EX, mode="sum", per_sample_weights=gates)
    else:
        merged = _dense_gates(gate_BK, expert_BK, flat_EX) @ flat_EX
    return merged.view(-1, *bank.shape[1:])


def _dense_gates(gate_BK: Tensor, expert_BK: Tensor, flat_EX: Tensor) -> Tensor:
    zeros = flat_EX.new_zeros(gate_BK.size(0), flat_EX.size(0))
    return zeros.scatter(1, expert_BK, gate_BK.to(flat_EX.dtype))


def _chunks(num_sentences: int, weight_EIO: Tensor) -> list[slice]:
    each = max(1, CHUNK_NUMBERS // weight_EIO[0].numel())
    return [slice(start, start + each) for start in range(0, num_sentences, each)]
