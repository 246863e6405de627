"""Route a few tokens without capacity and gradient, as in decoding, by one program: from tokens to rows by expert.

Gates and tokens of the whole batch fit into one tile, so counts, places and lists are sums along its two sides, and
nothing passes through memory. The decisions are those of route.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gate import gate_product, is_real_token
from .route import LEAST_MASS, order_gates


@triton.jit(do_not_specialize=["num_tokens", "threshold_units", "most", "max_tiles"])
def route_few(
    x, weight, padding,
    token_R, weight_R, row_end_E, tile_N3, row_TK, count_T, count_E, wanted_E,
    load_G, coefficient_G, prob_sum_G, totals, real_count,
    num_tokens, width, num_gates, num_experts, threshold_units, most, most_true, max_tiles,
    BY_THRESHOLD: tl.constexpr, NORMALIZE: tl.constexpr, LOAD_OF_ALL: tl.constexpr, HAS_PADDING: tl.constexpr,
    GATE_BITS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Everything that gate_logits, route_forward, select, place and by_token write for later kernels and statistics.

    Args:
        x: (T, D). weight: (G, D). padding: bool (T,), read if HAS_PADDING.
        most: most gates of a token. most_true: K of row_TK (T, K). The others are as in these kernels.
    """
    token, gate = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_G)
    is_token, is_gate, is_true = token < num_tokens, gate < num_gates, gate < num_experts
    is_real = is_real_token(padding, token, is_token, HAS_PADDING)
    logit = gate_product(x, weight, token, gate, is_real, width, num_gates, PRECISION, WIDEN, BLOCK_T, BLOCK_G, BLOCK_D)
    logit = tl.where(is_gate[None, :], logit, -float("inf"))
    prob, log_mass, entropy, key, sorted_key, _, chosen_place = order_gates(
        logit, gate, is_gate, is_token, is_real, threshold_units, most, BY_THRESHOLD, GATE_BITS
    )
    # the chosen places come first, so a gate is chosen if its key is at most that of the last chosen place
    last_key = tl.max(tl.where(chosen_place, sorted_key, -1), axis=1)
    chosen = (key <= last_key[:, None]) & is_gate[None, :]
    kept = (chosen & is_true[None, :]).to(tl.int32)

    count = tl.sum(kept, axis=0)
    end = tl.cumsum(count, axis=0)
    first = end - count
    tl.store(count_E + gate, count.to(tl.int64), mask=is_true)
    tl.store(wanted_E + gate, count.to(tl.int64), mask=is_true)
    tl.store(row_end_E + gate, end, mask=is_true)
    _store_tiles(tile_N3, gate, count, first, end, max_tiles, TILE_ROWS, BLOCK_G)

    row = first[None, :] + tl.cumsum(kept, axis=0) - kept
    row_weight = prob
    if NORMALIZE:
        chosen_mass = tl.sum(tl.where(kept != 0, prob, 0.0), axis=1)
        row_weight = prob / tl.where(chosen_mass > LEAST_MASS, chosen_mass, 1.0)[:, None]
    tl.store(token_R + row, token[:, None] + tl.zeros_like(row), mask=kept != 0)
    tl.store(weight_R + row, row_weight, mask=kept != 0)
    tl.store(row_TK + token[:, None] * most_true + tl.cumsum(kept, axis=1) - kept, row, mask=kept != 0)
    tl.store(count_T + token, tl.sum(kept, axis=1), mask=is_token)

    _store_sums(
        prob, log_mass, entropy, key, chosen, is_real, is_gate, is_true, gate,
        load_G, coefficient_G, prob_sum_G, totals, real_count, num_gates, num_experts, LOAD_OF_ALL,
    )  # fmt: skip


@triton.jit
def _store_tiles(tile_N3, gate, count, first, end, max_tiles, TILE_ROWS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Tiles of TILE_ROWS rows of each expert; behind them equal rows, which are no tile."""
    tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    first_tile = tl.cumsum(tiles, axis=0) - tiles
    for number in range(tl.max(tiles, axis=0)):
        tile_at = tile_N3 + 3 * (first_tile + number)
        tl.store(tile_at, gate, mask=number < tiles)
        tl.store(tile_at + 1, first + number * TILE_ROWS, mask=number < tiles)
        tl.store(tile_at + 2, end, mask=number < tiles)
    for start in range(tl.sum(tiles, axis=0), max_tiles, BLOCK_G):
        none = tl.zeros((BLOCK_G,), tl.int32)
        tl.store(tile_N3 + 3 * (start + gate) + 1, none, mask=start + gate < max_tiles)
        tl.store(tile_N3 + 3 * (start + gate) + 2, none, mask=start + gate < max_tiles)


@triton.jit
def _store_sums(
    prob, log_mass, entropy, key, chosen, is_real, is_gate, is_true, gate,
    load_G, coefficient_G, prob_sum_G, totals, real_count, num_gates, num_experts, LOAD_OF_ALL: tl.constexpr,
):  # fmt: skip
    """Sums over tokens for the losses and statistics."""
    num_real = tl.sum(is_real.to(tl.int32), axis=0)
    tokens = tl.maximum(num_real.to(tl.float32), 1.0)
    if LOAD_OF_ALL:
        load = tl.sum(chosen.to(tl.float32), axis=0)
        # AdaMoE's Eq 6: each null gate gets the mean load of the null gates
        of_nulls = tl.sum(tl.where(is_true, 0.0, load), axis=0) / tl.maximum(num_gates - num_experts, 1)
        load = tl.where(is_true, load, of_nulls)
    else:
        load = tl.sum(((key == tl.min(key, axis=1)[:, None]) & is_real[:, None]).to(tl.float32), axis=0)
    tl.store(load_G + gate, load, mask=is_gate)
    tl.store(coefficient_G + gate, load * (num_gates / (tokens * tokens)), mask=is_gate)
    tl.store(prob_sum_G + gate, tl.sum(tl.where(is_real[:, None], prob, 0.0), axis=0), mask=is_gate)
    tl.store(real_count, num_real.to(tl.int64))
    tl.store(totals, num_real.to(tl.float32))
    tl.store(totals + 1, tl.sum(tl.where(is_real, entropy, 0.0), axis=0) / tokens)
    tl.store(totals + 2, tl.sum(tl.where(is_real, log_mass * log_mass, 0.0), axis=0) / tokens)
