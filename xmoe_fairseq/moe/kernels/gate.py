"""The router's linear map in float32: logits, and the two gradients of it.

``x`` may be half precision. Its values are exact in bfloat16 or in TF32, so products with the float32 weight split into
three bfloat16 parts (``PRECISION`` split), or two of TF32 (tf32x3), are as good as float32 products and run on
tensor cores. float32 ``x`` is multiplied as torch's settings say: ieee, or tf32 where that is allowed.

Rows of padding are not read, because they may hold NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split_product(left, right, total, WIDEN: tl.constexpr):
    """bfloat16 times float32 as three bfloat16 products: 24 bits of ``right`` in three parts of 8, smallest first."""
    high = right.to(tl.bfloat16)
    rest = right - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    if WIDEN:
        whole = left.to(tl.float32)
        total = tl.dot(whole, low.to(tl.float32), total)
        total = tl.dot(whole, middle.to(tl.float32), total)
        return tl.dot(whole, high.to(tl.float32), total)
    else:
        total = tl.dot(left, low, total)
        total = tl.dot(left, middle, total)
        return tl.dot(left, high, total)


@triton.jit
def gate_product(
    x, weight, token, gate, is_read, width, num_gates,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_T, BLOCK_G): rows of x (T, D) times rows of weight (G, D); 0 for tokens not read."""
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        in_width = start + column < width
        x_tile = tl.load(
            x + token.to(tl.int64)[:, None] * width + (start + column)[None, :],
            mask=is_read[:, None] & in_width[None, :], other=0.0,
        )  # fmt: skip
        weight_tile = tl.load(
            weight + gate[None, :] * width + (start + column)[:, None],
            mask=(gate < num_gates)[None, :] & in_width[:, None], other=0.0,
        )  # fmt: skip
        if PRECISION == "split":
            total = _split_product(x_tile, weight_tile.to(tl.float32), total, WIDEN)
        else:
            total = tl.dot(x_tile.to(tl.float32), weight_tile.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def is_real_token(padding, token, is_token, HAS_PADDING: tl.constexpr):
    """bool: tokens of the batch that are not padding."""
    if HAS_PADDING:
        return is_token & (tl.load(padding + token, mask=is_token, other=0) == 0)
    else:
        return is_token


@triton.jit(do_not_specialize=["num_tokens"])
def gate_logits(
    x, weight, padding, logits, num_tokens, width, num_gates,
    HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """logits (T, G) float32 = x (T, D) @ weight (G, D)^T; rows of padding become 0."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    gate = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    is_read = is_real_token(padding, token, token < num_tokens, HAS_PADDING)
    total = gate_product(x, weight, token, gate, is_read, width, num_gates, PRECISION, WIDEN, BLOCK_T, BLOCK_G, BLOCK_D)
    where = token.to(tl.int64)[:, None] * num_gates + gate[None, :]
    tl.store(logits + where, total, mask=(token < num_tokens)[:, None] & (gate < num_gates)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def gate_input_gradient(
    grad_logits, weight, others, grad_x, num_tokens, width, num_gates,
    HAS_OTHERS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_x (T, D) = grad_logits (T, G) @ weight (G, D), plus ``others`` (T, D) if HAS_OTHERS."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gate = tl.arange(0, BLOCK_G)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, num_gates, BLOCK_G):
        is_gate = start + gate < num_gates
        grad_tile = tl.load(
            grad_logits + token.to(tl.int64)[:, None] * num_gates + (start + gate)[None, :],
            mask=(token < num_tokens)[:, None] & is_gate[None, :], other=0.0,
        )  # fmt: skip
        weight_tile = tl.load(
            weight + (start + gate)[:, None] * width + column[None, :],
            mask=is_gate[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(grad_tile, weight_tile.to(tl.float32), total, input_precision=PRECISION)
    where = token.to(tl.int64)[:, None] * width + column[None, :]
    mask = (token < num_tokens)[:, None] & (column < width)[None, :]
    if HAS_OTHERS:
        total += tl.load(others + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + where, total.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_weight_gradient(
    grad_logits, x, padding, partial, num_tokens, width, num_gates, chunk,
    HAS_PADDING: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial (S, G, D) float32: sums of grad_logits^T @ x over S chunks of tokens, which ``add_chunks`` adds."""
    gate = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(0) * chunk
    total = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    for start in range(first, first + chunk, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        is_read = is_real_token(padding, token, token < num_tokens, HAS_PADDING)
        grad_tile = tl.load(
            grad_logits + token.to(tl.int64)[None, :] * num_gates + gate[:, None],
            mask=is_read[None, :] & (gate < num_gates)[:, None], other=0.0,
        )  # fmt: skip
        x_tile = tl.load(
            x + token.to(tl.int64)[:, None] * width + column[None, :],
            mask=is_read[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        if PRECISION == "split":
            # two parts of 8 bits each, more than TF32 keeps; the small one first
            high = grad_tile.to(tl.bfloat16)
            low = (grad_tile - high.to(tl.float32)).to(tl.bfloat16)
            if WIDEN:
                total = tl.dot(low.to(tl.float32), x_tile.to(tl.float32), total)
                total = tl.dot(high.to(tl.float32), x_tile.to(tl.float32), total)
            else:
                total = tl.dot(low, x_tile, total)
                total = tl.dot(high, x_tile, total)
        else:
            total = tl.dot(grad_tile, x_tile.to(tl.float32), total, input_precision=PRECISION)
    where = (tl.program_id(0).to(tl.int64) * num_gates + gate[:, None]) * width + column[None, :]
    tl.store(partial + where, total, mask=(gate < num_gates)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["num_chunks"])
def add_chunks(partial, grad, num_chunks, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """grad (N,) = sum of partial (S, N), in a fixed order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, num_chunks, BLOCK_S):
        chunk = start + tl.arange(0, BLOCK_S)
        where = partial + chunk.to(tl.int64)[:, None] * size + place[None, :]
        mask = (chunk < num_chunks)[:, None] & (place < size)[None, :]
        total += tl.sum(tl.load(where, mask=mask, other=0.0), axis=0)
    tl.store(grad + place, total.to(grad.dtype.element_ty), mask=place < size)
