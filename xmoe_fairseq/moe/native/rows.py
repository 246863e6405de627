"""Linear maps of few rows by expert: the C++ library on a CPU that has it, torch's operators elsewhere.

int8: a weight is ``scale[e, o] * w[e, o, i]`` with w in -127 .. 127 (one scale per output channel); an input row is
``scale[r] * (q[r, i] + shift[r])`` with q in -128 .. 127, its own scale and zero, so that no row depends on another.
Sums are exact integers and the float epilogue is the same sequence of rounded operations everywhere, so every path
gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .library import call, chosen_path

LEAST_SPAN = 1e-30  # as in rows_body.h
# float32 adds integers exactly below 2^24; |q * w| is at most 128 * 127
EXACT_WIDTH = 2**24 // (128 * 127)


class Int8Rows(NamedTuple):
    """Quantised rows: ``scale_R * (q_RI + shift_R)``.

    Attributes:
        q_RI: int8.
        scale_R: float32; NaN for a row that holds one, or an infinity.
        shift_R: int32 in -127 .. 128.
        sum_R: int32, the sum of each row of ``q_RI``.
    """

    q_RI: Tensor
    scale_R: Tensor
    shift_R: Tensor
    sum_R: Tensor


class Int8Weights(NamedTuple):
    """Quantised matrices with one row per output channel.

    Attributes:
        w_EOI: int8 in -127 .. 127.
        scale_EO: float32.
        sum_EO: int32, the sum of each channel of ``w_EOI``.
        bias_EO: float32; None for none.
    """

    w_EOI: Tensor
    scale_EO: Tensor
    sum_EO: Tensor
    bias_EO: Tensor | None


class Groups(NamedTuple):
    """The input row of each assignment, and the first assignment of each expert.

    Attributes:
        row_A: int64; None: assignment a takes row a.
        start_E: int64 (E + 1,), ends with A.
        size: A.
    """

    row_A: Tensor | None
    start_E: Tensor
    size: int


def quantise_rows(x_RI: Tensor, path: str | None = None) -> Int8Rows:
    """255 steps from min(x, 0) to max(x, 0) of each row: 0 is exact. ``x_RI``: float32, contiguous."""
    path = path or path_for(x_RI)
    if path == "torch":
        return _quantise_in_torch(x_RI)
    num_rows, width = x_RI.shape
    rows = Int8Rows(
        torch.empty(num_rows, width, dtype=torch.int8),
        torch.empty(num_rows),
        torch.empty(num_rows, dtype=torch.int32),
        torch.empty(num_rows, dtype=torch.int32),
    )
    call("quantise", path, x_RI, num_rows, width, *rows)
    return rows


def int8_linear(rows: Int8Rows, weights: Int8Weights, groups: Groups, path: str | None = None) -> Tensor:
    """float32 (A, O): each assignment's row times its expert's matrix, plus its bias."""
    path = path or path_for(rows.q_RI)
    if path == "torch":
        return _int8_linear_in_torch(rows, weights, groups)
    num_experts, out_width, in_width = weights.w_EOI.shape
    out_AO = torch.empty(groups.size, out_width)
    call("int8_linear", path, *rows, groups.row_A, groups.start_E, num_experts, *weights, in_width, out_width, out_AO)
    return out_AO


def int8_linear_of_floats(x_RI: Tensor, weights: Int8Weights, groups: Groups, path: str | None = None) -> Tensor:
    """``int8_linear`` of ``quantise_rows(x_RI)`` in one call."""
    path = path or path_for(x_RI)
    if path == "torch":
        return _int8_linear_in_torch(_quantise_in_torch(x_RI), weights, groups)
    num_experts, out_width, in_width = weights.w_EOI.shape
    num_rows = x_RI.size(0)
    out_AO = torch.empty(groups.size, out_width)
    scratch = torch.empty(num_rows * (in_width + 12) + 64, dtype=torch.uint8)
    rows = (x_RI, num_rows, scratch, groups.row_A, groups.start_E, num_experts)
    call("int8_linear_of_floats", path, *rows, *weights, in_width, out_width, out_AO)
    return out_AO


def float_linear(
    x_RI: Tensor, w_EIO: Tensor, bias_EO: Tensor | None, groups: Groups, path: str | None = None
) -> Tensor:
    """float32 (A, O) from float32 rows and float32 or bfloat16 matrices; sums run over I in order."""
    path = path or path_for(x_RI)
    if path == "torch":
        return _float_linear_in_torch(x_RI, w_EIO, bias_EO, groups)
    num_experts, in_width, out_width = w_EIO.shape
    out_AO = torch.empty(groups.size, out_width)
    is_bfloat16 = int(w_EIO.dtype == torch.bfloat16)
    call(
        "float_linear",
        path,
        x_RI,
        groups.row_A,
        groups.start_E,
        num_experts,
        w_EIO,
        is_bfloat16,
        bias_EO,
        in_width,
        out_width,
        out_AO,
    )
    return out_AO


def combine(out_AD: Tensor, weight_A: Tensor, token_A: Tensor, num_tokens: int, path: str | None = None) -> Tensor:
    """float32 (T, D): the sum of each token's assignments times their weight (float32), in the order of A."""
    path = path or path_for(out_AD)
    if path == "torch":
        return _combine_in_torch(out_AD, weight_A, token_A, num_tokens)
    y_TD = torch.empty(num_tokens, out_AD.size(1))
    call("combine", path, out_AD, weight_A, token_A, *out_AD.shape[:1], num_tokens, out_AD.size(1), y_TD)
    return y_TD


def path_for(tensor: Tensor) -> str:
    """The chosen path on a CPU; torch on other devices, and while torch's operators are counted (FLOPs)."""
    watched = _get_current_dispatch_mode() is not None
    return chosen_path() if tensor.device.type == "cpu" and not watched else "torch"


def _quantise_in_torch(x_RI: Tensor) -> Int8Rows:
    low_R, high_R = x_RI.amin(dim=1).clamp(max=0), x_RI.amax(dim=1).clamp(min=0)
    span_R = high_R - low_R
    steps_R = torch.full_like(span_R, 255.0)  # a plain number would be multiplied with a rounded reciprocal
    inverse_R = torch.where(span_R >= LEAST_SPAN, steps_R / span_R, 0.0)
    zero_R = ((0.0 - low_R) * inverse_R).round()
    is_number_R = torch.isfinite(x_RI).all(dim=1)
    q_RI = ((x_RI * inverse_R.unsqueeze(1)).round() + (zero_R - 128).unsqueeze(1)).clamp(-128, 127)
    q_RI = q_RI.nan_to_num(0.0).to(torch.int8)
    return Int8Rows(
        q_RI,
        torch.where(is_number_R, span_R / steps_R, torch.nan),
        128 - torch.where(is_number_R, zero_R, 0.0).int(),
        q_RI.sum(dim=1, dtype=torch.int32),
    )


def _int8_linear_in_torch(rows: Int8Rows, weights: Int8Weights, groups: Groups) -> Tensor:
    num_experts, out_width, in_width = weights.w_EOI.shape
    out_AO = rows.scale_R.new_empty(groups.size, out_width)
    exact = torch.float32 if in_width <= EXACT_WIDTH else torch.float64
    for expert, part, row in _pieces(groups, num_experts):
        total = rows.q_RI[row].to(exact) @ weights.w_EOI[expert].to(exact).t()
        total = total.to(torch.int32) + rows.shift_R[row].unsqueeze(1) * weights.sum_EO[expert]
        value = total.float() * (rows.scale_R[row].unsqueeze(1) * weights.scale_EO[expert])
        out_AO[part] = value if weights.bias_EO is None else value + weights.bias_EO[expert]
    return out_AO


def _float_linear_in_torch(x_RI: Tensor, w_EIO: Tensor, bias_EO: Tensor | None, groups: Groups) -> Tensor:
    out_AO = x_RI.new_empty(groups.size, w_EIO.size(2))
    for expert, part, row in _pieces(groups, w_EIO.size(0)):
        value = x_RI[row] @ w_EIO[expert].float()
        out_AO[part] = value if bias_EO is None else value + bias_EO[expert]
    return out_AO


def _pieces(groups: Groups, num_experts: int) -> list[tuple[int, slice, Tensor | slice]]:
    """(expert, its assignments, their input rows) of every expert that has assignments."""
    start = groups.start_E.tolist()
    parts = [(expert, slice(start[expert], start[expert + 1])) for expert in range(num_experts)]
    return [
        (expert, part, part if groups.row_A is None else groups.row_A[part])
        for expert, part in parts
        if part.start < part.stop
    ]


def _combine_in_torch(out_AD: Tensor, weight_A: Tensor, token_A: Tensor, num_tokens: int) -> Tensor:
    """One rank of assignments after the other: each token once per turn, so that the order of sums is A's."""
    y_TD = out_AD.new_zeros(num_tokens, out_AD.size(1))
    scaled_AD = out_AD * weight_A.unsqueeze(1)
    order_A = torch.argsort(token_A, stable=True)
    count_T = torch.bincount(token_A, minlength=num_tokens)
    turn_A = torch.arange(order_A.numel(), device=order_A.device) - (count_T.cumsum(0) - count_T)[token_A[order_A]]
    for turn in range(int(count_T.max()) if count_T.numel() else 0):
        now = order_A[turn_A == turn]
        y_TD[token_A[now]] += scaled_AD[now]
    return y_TD
