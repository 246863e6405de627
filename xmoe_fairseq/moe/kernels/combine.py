"""Sum a token's rows and an expert's bias gradients in a fixed order, without atomics, so that results repeat."""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped import tile_of


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


@triton.jit(do_not_specialize=["max_rows", "num_parts"])
def row_weight_backward(
    grad_y, b2, weight_R, inner_PR, token_R, tile_N3, grad_weight_R, output_sum,
    width, max_rows, num_parts,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a row's weight, <expert output, its gradient>: one program per tile of rows.

    Args:
        inner_PR: parts of <hidden, gradient> from grouped.hidden_backward; <grad_y[token], b2[e]> is added.
        grad_weight_R: float32 out. output_sum: float32 out (tiles, D), sums of weight * grad_y over a tile's rows.
    """
    tile = tl.program_id(0)
    expert, first, end, row, in_rows = tile_of(tile_N3, tile, BLOCK_M)
    if first == end:
        return
    token = tl.load(token_R + row, mask=in_rows, other=0).to(tl.int64)
    weight = tl.load(weight_R + row, mask=in_rows, other=0.0)
    inner = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        where = inner_PR + part.to(tl.int64)[:, None] * max_rows + row[None, :]
        inner += tl.sum(tl.load(where, mask=(part < num_parts)[:, None] & in_rows[None, :], other=0.0), axis=0)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        in_width = column < width
        bias = tl.load(b2 + expert.to(tl.int64) * width + column, mask=in_width, other=0.0).to(tl.float32)
        grad = tl.load(
            grad_y + token[:, None] * width + column[None, :], mask=in_rows[:, None] & in_width[None, :], other=0.0
        ).to(tl.float32)
        inner += tl.sum(grad * bias[None, :], axis=1)
        tl.store(output_sum + tile.to(tl.int64) * width + column, tl.sum(grad * weight[:, None], axis=0), mask=in_width)
    tl.store(grad_weight_R + row, inner, mask=in_rows)


@triton.jit
def bias_gradients(
    hidden_sum, output_sum, count_E, grad_b1, grad_b2, num_hidden, width, num_experts,
    TILE_ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_b1 (E, F) and grad_b2 (E, D): sums over an expert's tiles of hidden_sum (tiles, F), output_sum (tiles, D).

    Programs of an expert: first the blocks of F, then those of D.
    """
    expert = tl.program_id(0)
    other = tl.arange(0, BLOCK_E)
    count = tl.load(count_E + other, mask=other < num_experts, other=0).to(tl.int32)
    tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    first = tl.sum(tl.where(other < expert, tiles, 0), axis=0)
    end = first + tl.sum(tl.where(other == expert, tiles, 0), axis=0)
    block = tl.program_id(1)
    hidden_blocks = tl.cdiv(num_hidden, BLOCK_N)
    if block < hidden_blocks:
        _sum_of_tiles(hidden_sum, grad_b1, expert, first, end, block, num_hidden, BLOCK_N)
    else:
        _sum_of_tiles(output_sum, grad_b2, expert, first, end, block - hidden_blocks, width, BLOCK_N)


@triton.jit
def _sum_of_tiles(sums, grad, expert, first, end, block, num_n, BLOCK_N: tl.constexpr):
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < num_n
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_at = sums + first.to(tl.int64) * num_n + column
    for _ in range(first, end):
        total += tl.load(sum_at, mask=in_columns, other=0.0)
        sum_at += num_n
    where = grad + expert.to(tl.int64) * num_n + column
    tl.store(where, total.to(grad.dtype.element_ty), mask=in_columns)
