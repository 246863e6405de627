"""Sum a token's rows and an expert's bias gradients in a fixed order, without atomics, so that results repeat."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine_rows(rows, row_TK, count_T, y, width, most, BLOCK_D: tl.constexpr):
    """y (T, D) = sum of a token's rows (R, D), by expert, in float32; 0 for a token without rows."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = column < width
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for place in range(tl.load(count_T + token)):
        row = tl.load(row_TK + token.to(tl.int64) * most + place).to(tl.int64)
        total += tl.load(rows + row * width + column, mask=in_width, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * width + column, total.to(y.dtype.element_ty), mask=in_width)


@triton.jit(do_not_specialize=["max_rows", "first_part"])
def output_bias_backward(
    grad_y, b2, weight_R, token_R, row_end_E, grad_b2, inner_PR, width, max_rows, first_part,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_b2 (E, D): sum of weight * grad_y over an expert's rows.

    inner_PR[first_part + block], float32 out: part of <grad_y, b2> of each row.
    """
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = column < width
    first = tl.load(row_end_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(row_end_E + expert)
    where = expert.to(tl.int64) * width + column
    bias = tl.load(b2 + where, mask=in_width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    part = (first_part + tl.program_id(1)).to(tl.int64) * max_rows
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        in_rows = row < end
        token = tl.load(token_R + row, mask=in_rows, other=0).to(tl.int64)
        weight = tl.load(weight_R + row, mask=in_rows, other=0.0)
        grad = tl.load(
            grad_y + token[:, None] * width + column[None, :], mask=in_rows[:, None] & in_width[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(grad * weight[:, None], axis=0)
        tl.store(inner_PR + part + row, tl.sum(grad * bias[None, :], axis=1), mask=in_rows)
    tl.store(grad_b2 + where, total.to(grad_b2.dtype.element_ty), mask=in_width)


@triton.jit
def hidden_bias_backward(
    bias_sum, count_E, grad_b1, num_hidden, num_experts,
    TILE_ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """grad_b1 (E, F): the sum over an expert's tiles of the sums that grouped.hidden_backward made."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_columns = column < num_hidden
    other = tl.arange(0, BLOCK_E)
    count = tl.load(count_E + other, mask=other < num_experts, other=0).to(tl.int32)
    tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    first = tl.sum(tl.where(other < expert, tiles, 0), axis=0)
    num_tiles = tl.sum(tl.where(other == expert, tiles, 0), axis=0)
    total = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for tile in range(first, first + num_tiles):
        where = bias_sum + tile * num_hidden + column
        total += tl.load(where, mask=in_columns, other=0.0)
    where = expert.to(tl.int64) * num_hidden + column
    tl.store(grad_b1 + where, total.to(grad_b1.dtype.element_ty), mask=in_columns)
