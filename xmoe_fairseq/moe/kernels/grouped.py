"""Matrix products of ragged groups of rows with their experts' matrices.

Rows of one expert lie together (serve.py). A program computes a tile of BLOCK_M rows of one expert times BLOCK_N
columns, given by ``tile_N3``, and ends at once if there is no such tile. The grid has a static
bound, so that the host need not know the counts.

Row buffers are addressed from the tile's first row, so that R x F may exceed 2^31. ``DOT`` is the precision of float32
products. ``WIDEN`` multiplies half-precision tiles as float32: the interpreter's bfloat16 product is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, activate_with_slope, dropout_scale


@triton.jit
def _product(left, right, total, DOT: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision=DOT)
    else:
        return tl.dot(left, right, total, input_precision=DOT)


@triton.jit
def tile_of(tile_N3, tile, BLOCK_M: tl.constexpr):
    """A tile's expert, its first row, the end of the expert's rows, the tile's rows and their mask.

    There is no tile if the end is the first row. Kernels return by these two alone: then the loads of the expert and of
    the rows' tokens wait for the same loads, and the first tile of a short product arrives sooner.
    """
    expert = tl.load(tile_N3 + 3 * tile)
    first = tl.load(tile_N3 + 3 * tile + 1)
    end = tl.load(tile_N3 + 3 * tile + 2)
    row = first + tl.arange(0, BLOCK_M)
    return expert, first, end, row, row < end


@triton.jit
def _rows_times_matrix(
    left, row_step, row_offset, right, k_step, n_step, num_k, column, in_columns,
    EVEN_K: tl.constexpr, DOT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_M, BLOCK_N): rows at ``row_offset`` (int64) of ``left`` times columns of ``right``."""
    k = tl.arange(0, BLOCK_K)
    left_at = left + row_offset[:, None] * row_step + k[None, :]
    right_at = right + k[:, None] * k_step + column[None, :] * n_step
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_k, BLOCK_K):
        if EVEN_K:
            left_tile = tl.load(left_at)
            right_tile = tl.load(right_at, mask=in_columns[None, :], other=0.0)
        else:
            in_k = start + k < num_k
            left_tile = tl.load(left_at, mask=in_k[None, :], other=0.0)
            right_tile = tl.load(right_at, mask=in_k[:, None] & in_columns[None, :], other=0.0)
        total = _product(left_tile, right_tile, total, DOT, WIDEN)
        left_at += BLOCK_K
        right_at += BLOCK_K * k_step
    return total


@triton.jit
def expert_up(
    x, w1, b1, weight_R, pre, hidden, token_R, tile_N3, seed,
    width, num_hidden, dropout,
    ACTIVATION: tl.constexpr, SAVE_PRE: tl.constexpr, HAS_DROPOUT: tl.constexpr, PARTS: tl.constexpr,
    EVEN_K: tl.constexpr, DOT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden (R, F) = weight_R * activation(pre) with pre = x[token] @ w1[e] + b1[e], stored if SAVE_PRE."""
    num_n = tl.cdiv(num_hidden, BLOCK_N)
    tile = tl.program_id(0) // num_n
    expert, first, end, row, in_rows = tile_of(tile_N3, tile, BLOCK_M)
    if first == end:
        return
    # rows behind the expert's last one are computed from token 0 and not stored
    token = tl.load(token_R + row, mask=in_rows, other=0)
    column = (tl.program_id(0) % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < num_hidden
    expert_long = expert.to(tl.int64)
    total = _rows_times_matrix(
        x, width, token.to(tl.int64), w1 + expert_long * width * num_hidden, num_hidden, 1, width, column, in_columns,
        EVEN_K, DOT, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    base = first.to(tl.int64) * num_hidden
    local = tl.arange(0, BLOCK_M)
    bias_at = b1 + expert_long * num_hidden
    weight = tl.load(weight_R + row, mask=in_rows, other=0.0)
    if PARTS == 1:
        _store_hidden(
            total, column, row, local, in_rows, weight, bias_at, pre + base, hidden + base, seed, num_hidden, dropout,
            ACTIVATION, SAVE_PRE, HAS_DROPOUT,
        )  # fmt: skip
    else:
        left, right = _halves(total, BLOCK_M, BLOCK_N)
        start = (tl.program_id(0) % num_n) * BLOCK_N
        half = start + tl.arange(0, BLOCK_N // 2)
        _store_hidden(
            left, half, row, local, in_rows, weight, bias_at, pre + base, hidden + base, seed, num_hidden, dropout,
            ACTIVATION, SAVE_PRE, HAS_DROPOUT,
        )  # fmt: skip
        _store_hidden(
            right, half + BLOCK_N // 2, row, local, in_rows, weight, bias_at, pre + base, hidden + base, seed,
            num_hidden, dropout, ACTIVATION, SAVE_PRE, HAS_DROPOUT,
        )  # fmt: skip


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile's columns. An epilogue on halves keeps half as many values in registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _store_hidden(
    total, column, row, local, in_rows, weight, bias_at, pre, hidden, seed, num_hidden, dropout,
    ACTIVATION: tl.constexpr, SAVE_PRE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Bias, activation and dropout of one part of a tile; ``pre`` and ``hidden`` begin at the tile's first row."""
    in_columns = column < num_hidden
    bias = tl.load(bias_at + column, mask=in_columns, other=0.0)
    # the activation reads pre-activations in the dtype in which they are kept, as the backward pass does
    total = (total + bias.to(tl.float32)[None, :]).to(hidden.dtype.element_ty)
    where = local[:, None] * num_hidden + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if SAVE_PRE:
        tl.store(pre + where, total, mask=mask)
    result = activate(total.to(tl.float32), ACTIVATION, hidden.dtype.element_ty == tl.float32)
    if HAS_DROPOUT:
        result *= dropout_scale(seed, row, column, num_hidden, dropout)
    tl.store(hidden + where, (result * weight[:, None]).to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def rows_times_experts(
    rows, weight, bias, weight_R, out, tile_N3,
    num_k, num_n, expert_step, k_step, n_step,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, DOT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (R, N) = rows (R, K) @ weight[e] (K, N); with HAS_BIAS plus weight_R * bias[e]."""
    num_blocks = tl.cdiv(num_n, BLOCK_N)
    tile = tl.program_id(0) // num_blocks
    expert, first, end, row, in_rows = tile_of(tile_N3, tile, BLOCK_M)
    if first == end:
        return
    column = (tl.program_id(0) % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < num_n
    expert_long = expert.to(tl.int64)
    # rows behind the last one repeat it, because the buffer may end there
    read = tl.minimum(row, end - 1).to(tl.int64)
    total = _rows_times_matrix(
        rows, num_k, read, weight + expert_long * expert_step, k_step, n_step, num_k, column, in_columns,
        EVEN_K, DOT, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        bias_row = tl.load(bias + expert_long * num_n + column, mask=in_columns, other=0.0).to(tl.float32)
        total += tl.load(weight_R + row, mask=in_rows, other=0.0)[:, None] * bias_row[None, :]
    base = first.to(tl.int64) * num_n
    where = tl.arange(0, BLOCK_M)[:, None] * num_n + column[None, :]
    tl.store(out + base + where, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["max_rows"])
def hidden_backward(
    grad_y, w2, pre, weight_R, grad_pre, inner_PR, hidden_sum,
    token_R, tile_N3, seed, width, num_hidden, dropout, max_rows,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr, DOT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the hidden units, and all elementwise work between the two linear maps.

    Args:
        grad_y: (T, D), gathered while loading. pre: (R, F), as the forward pass kept it.
        grad_pre: out (R, F), gradient of ``pre``.
        inner_PR: float32 out (P, R), P = column blocks: part of <hidden, gradient>, the gradient of a row's weight.
        hidden_sum: float32 out (tiles, F), sums of ``grad_pre`` over a tile's rows.
    """
    num_n = tl.cdiv(num_hidden, BLOCK_N)
    tile = tl.program_id(0) // num_n
    block = tl.program_id(0) % num_n
    expert, first, end, row, in_rows = tile_of(tile_N3, tile, BLOCK_M)
    if first == end:
        return
    # rows behind the expert's last one repeat its token with weight 0 and pre-activations 0, so they add 0 to every sum
    token = tl.load(token_R + tl.minimum(row, end - 1))
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < num_hidden
    base = first.to(tl.int64) * num_hidden
    where = tl.arange(0, BLOCK_M)[:, None] * num_hidden + column[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    # loaded before the product, so that the values have arrived when it is done
    kept = tl.load(pre + base + where, mask=mask, other=0.0)
    weight = tl.load(weight_R + row, mask=in_rows, other=0.0)
    grad = _rows_times_matrix(
        grad_y, width, token.to(tl.int64), w2 + expert.to(tl.int64) * width * num_hidden, 1, width, width,
        column, in_columns, EVEN_K, DOT, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    unit, slope = activate_with_slope(kept.to(tl.float32), ACTIVATION, grad_pre.dtype.element_ty == tl.float32)
    if HAS_DROPOUT:
        scale = dropout_scale(seed, row, column, num_hidden, dropout)
        unit *= scale
        slope *= scale
    tl.store(inner_PR + block.to(tl.int64) * max_rows + row, tl.sum(unit * grad, axis=1), mask=in_rows)
    grad = grad * weight[:, None] * slope
    tl.store(grad_pre + base + where, grad.to(grad_pre.dtype.element_ty), mask=mask)
    tl.store(hidden_sum + tile.to(tl.int64) * num_hidden + column, tl.sum(grad, axis=0), mask=in_columns)


@triton.jit
def weight_gradient(
    left, right, grad, token_R, row_end_E, num_m, num_n,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """grad (E, M, N) = sum over an expert's rows of left (R or T, M) outer right (R or T, N); 0 for idle experts.

    A gathered operand is indexed by token while it is loaded.
    """
    # one function: a kernel, in which a call would hide that loads and products overlap
    expert = tl.program_id(1)
    num_blocks = tl.cdiv(num_n, BLOCK_N)
    m = (tl.program_id(0) // num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < num_m, n < num_n
    first = tl.load(row_end_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(row_end_E + expert)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    whole = first + (end - first) // BLOCK_R * BLOCK_R
    for start in range(first, whole, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        left_row, right_row = row, row
        if GATHER_LEFT:
            left_row = tl.load(token_R + row)
        if GATHER_RIGHT:
            right_row = tl.load(token_R + row)
        left_at = left + left_row.to(tl.int64)[:, None] * num_m + m[None, :]
        right_at = right + right_row.to(tl.int64)[:, None] * num_n + n[None, :]
        if EVEN:
            total = _product(tl.trans(tl.load(left_at)), tl.load(right_at), total, DOT, WIDEN)
        else:
            left_tile = tl.load(left_at, mask=in_m[None, :], other=0.0)
            right_tile = tl.load(right_at, mask=in_n[None, :], other=0.0)
            total = _product(tl.trans(left_tile), right_tile, total, DOT, WIDEN)
    if whole < end:
        # at the last rows both operands are masked to 0 behind the end
        row = whole + tl.arange(0, BLOCK_R)
        in_rows = row < end
        left_row, right_row = row, row
        if GATHER_LEFT:
            left_row = tl.load(token_R + row, mask=in_rows, other=0)
        if GATHER_RIGHT:
            right_row = tl.load(token_R + row, mask=in_rows, other=0)
        left_at = left + left_row.to(tl.int64)[:, None] * num_m + m[None, :]
        right_at = right + right_row.to(tl.int64)[:, None] * num_n + n[None, :]
        left_tile = tl.load(left_at, mask=in_rows[:, None] & in_m[None, :], other=0.0)
        right_tile = tl.load(right_at, mask=in_rows[:, None] & in_n[None, :], other=0.0)
        total = _product(tl.trans(left_tile), right_tile, total, DOT, WIDEN)
    base = expert.to(tl.int64) * num_m * num_n
    where = m[:, None] * num_n + n[None, :]
    tl.store(grad + base + where, total.to(grad.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
