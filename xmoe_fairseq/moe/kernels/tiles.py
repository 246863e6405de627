"""Tile sizes of the kernels, as functions of shapes and dtype alone, so that every call of a layer has the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

MAX_SELECT_BLOCK = 16384
LEAST_PLACE_BLOCK = 1024
MAX_FEW_TOKENS, MAX_FEW = 32, 4096  # more would not fit into the registers of one program


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two >= ``number``, within [least, most]."""
    return max(least, min(1 << max(number - 1, 0).bit_length(), most))


@dataclass(frozen=True)
class Tile:
    """Rows x columns of a program, depth of one step, and the compiler's scheduling.

    ``parts``: number of column parts in which an epilogue with elementwise work handles the tile, to save registers.
    ``registers``: limit per thread; None: the compiler's choice.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    registers: int | None = None


def tile_rows(max_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: about an expert's average number of rows, so that few are empty."""
    most = 64 if dtype == torch.float32 else 128
    return power_of_two(-(-max_rows // num_experts), 16, most)


@cache
def capability() -> tuple[int, int]:
    """Compute capability of the GPU; (9, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


def row_tile(rows: int, num_n: int, num_k: int, dtype: torch.dtype, *, most_n: int = 256) -> Tile:
    """Tile of rows times matrices; measured on an H100 for bfloat16.

    Args:
        rows: ``tile_rows``.
        most_n: most columns. If an activation follows the product, a tile of 128 columns (64 if it also reads tensors
            of the forward pass) leaves room for two programs on a processor: one multiplies while the other
            computes its epilogue.
    """
    return _row_tile(rows, num_n, num_k, dtype, most_n, capability() >= (9, 0))


@cache
def _row_tile(rows: int, num_n: int, num_k: int, dtype: torch.dtype, most_n: int, is_hopper: bool) -> Tile:
    if dtype == torch.float32:
        return Tile(rows, power_of_two(num_n, 16, 64), power_of_two(num_k, 16, 32), 4, 2)
    k = power_of_two(num_k, 16, 64)
    stages = 3 if num_k > k else 2
    n = power_of_two(num_n, 16, most_n if rows >= 128 else min(most_n, 128))
    warps = 8 if rows * n > 64 * 64 else 4
    if most_n < 256 and warps == 8:
        # before 9.0 products hold their operands in registers, too, and a limit would spill in their loop
        limit = 128 if is_hopper else None
        return Tile(rows, n, k, warps, stages, parts=2 if n > 64 else 1, registers=limit)
    return Tile(rows, n, k, warps, stages, parts=2 if rows * n > 32 * 32 * warps else 1)


def outer_tile(num_m: int, num_n: int, dtype: torch.dtype) -> Tile:
    """Tile of weight gradients; ``k`` is the number of rows in a step."""
    if dtype == torch.float32:
        return Tile(power_of_two(num_m, 16, 64), power_of_two(num_n, 16, 64), 32, 4, 2)
    m, n = power_of_two(num_m, 16, 128), power_of_two(num_n, 16, 128)
    # gathering takes two of four stages, one for the token of a row and one for the row
    return Tile(m, n, 64, 4 if capability() >= (9, 0) or m * n <= 64 * 128 else 8, 4)


def gate_tile(num_gates: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Gates and columns of a gate's program; float32 products without tensor cores have less room for both."""
    most = 32 if dtype == torch.float32 else 64
    return power_of_two(num_gates, 16, most), power_of_two(width, 16, most)


@cache
def route_blocks(num_gates: int) -> tuple[int, int]:
    """Tokens and gates of a routing program: about 1024 keys to sort."""
    gates = power_of_two(num_gates, 2, 1 << 20)
    return power_of_two(1024 // gates, 1, 64), gates


@cache
def few_blocks(num_tokens: int, num_gates: int) -> tuple[int, int, int] | None:
    """Tokens, gates, warps of the one program that routes few tokens; None if there are more than it can hold."""
    tokens, gates = power_of_two(num_tokens, 16, 1 << 30), power_of_two(num_gates, 16, 1 << 30)
    if tokens > MAX_FEW_TOKENS or tokens * gates > MAX_FEW:
        return None
    return tokens, gates, power_of_two(tokens * gates // 128, 4, 16)


@cache
def token_block(num_gates: int) -> int:
    """Tokens of a program that reads all gates of each: about 2048 values."""
    return power_of_two(2048 // power_of_two(num_gates, 2, 1 << 20), 1, 64)


@cache
def select_blocks(num_tokens: int) -> tuple[int, int, int]:
    """Tokens in a block, blocks, warps of the program that finds an expert's last served pair."""
    block = power_of_two(num_tokens, 128, MAX_SELECT_BLOCK)
    return block, max(1, -(-num_tokens // block)), power_of_two(block // 256, 1, 16)


@cache
def place_blocks(num_tokens: int) -> tuple[int, int, int]:
    """Tokens in a block, blocks, warps of the programs that number an expert's rows: about eight blocks."""
    block = power_of_two(-(-num_tokens // 8), power_of_two(num_tokens, 128, LEAST_PLACE_BLOCK), 8192)
    return block, max(1, -(-num_tokens // block)), power_of_two(block // 256, 1, 16)


@triton.jit
def _nothing():
    """A kernel whose type tells whether Triton was imported as interpreter or compiler."""


IS_INTERPRETED = isinstance(_nothing, InterpretedFunction)


def widens(dtype: torch.dtype) -> bool:
    """True if tiles are multiplied as float32: the interpreter's bfloat16 product is wrong."""
    return IS_INTERPRETED and dtype == torch.bfloat16
