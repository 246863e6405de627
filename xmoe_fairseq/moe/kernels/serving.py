"""The host side of serve.py: static bounds, the kept pairs, and the lists of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MoEConfig
from ..plan import Choices
from . import serve as serve_kernels
from .gating import flags
from .launch import Cost, launch
from .plan import Lists
from .tiles import place_blocks, power_of_two, select_blocks, tile_rows, token_block

# Above this the host waits for the number of rows if no capacity bounds it.
ROW_LIMIT_BYTES = 1 << 30


class Bounds(NamedTuple):
    """Capacity as integers (0: none) and static bounds of rows and tiles."""

    numerator: int
    denominator: int
    least: int
    rows: int
    tiles: int
    tile_rows: int


class Selected(NamedTuple):
    count_E: Tensor
    wanted_E: Tensor
    cut_E: Tensor
    ties_E: Tensor
    load_G: Tensor
    coefficient_G: Tensor
    prob_sum_G: Tensor
    totals: Tensor


def capacity_bounds(config: MoEConfig, num_tokens: int, most: int, training: bool, dtype: torch.dtype) -> Bounds:
    """Bounds without a count of the device: at most min(E x C, T x K) rows, and at most one tile a row."""
    fraction = config.capacity_fraction(training)
    num_experts = config.num_experts
    rows = num_tokens * min(most, num_experts)
    if fraction is not None:
        rows = min(rows, num_experts * (config.capacity(num_tokens, training) or 0))
    height = tile_rows(rows, num_experts, dtype)
    tiles = min(rows, -(-rows // height) + num_experts)
    numerator, denominator = fraction or (0, 1)
    return Bounds(numerator, denominator, config.min_capacity, rows, tiles, height)


def by_expert(choices: Choices, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rank (int32, -1: not chosen) and score (float32) of each pair, expert by expert: (E, T)."""
    num_tokens, most = choices.expert_TK.shape
    token_T1 = torch.arange(num_tokens, device=choices.expert_TK.device).unsqueeze(-1)
    # unchosen pairs are written behind the matrix
    pair_TK = torch.where(choices.chosen_TK, choices.expert_TK * num_tokens + token_T1, num_experts * num_tokens)
    rank_TK = torch.arange(most, dtype=torch.int32, device=pair_TK.device).expand_as(pair_TK)
    rank = torch.full((num_experts * num_tokens + 1,), -1, dtype=torch.int32, device=pair_TK.device)
    score = torch.zeros(num_experts * num_tokens + 1, device=pair_TK.device)
    rank.scatter_(0, pair_TK.reshape(-1), rank_TK.reshape(-1))
    score.scatter_(0, pair_TK.reshape(-1), choices.score_TK.detach().float().reshape(-1))
    return rank[:-1].view(num_experts, num_tokens), score[:-1].view(num_experts, num_tokens)


def select_served(
    rank_GT: Tensor,
    score_GT: Tensor,
    prob_GT: Tensor | None,
    padding_T: Tensor | None,
    entropy_T: Tensor | None,
    log_mass_T: Tensor | None,
    num_experts: int,
    bounds: Bounds,
    load_of_all: bool,
) -> tuple[Selected, Tensor]:
    num_gates, num_tokens = rank_GT.shape
    device = rank_GT.device
    counts = torch.empty(3 * num_experts + 1, dtype=torch.int64, device=device)
    ties_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    load_G, coefficient_G, prob_sum_G, totals = (torch.empty(size, device=device) for size in (*3 * [num_gates], 3))
    count_E, wanted_E, cut_E, num_real = counts.split([num_experts, num_experts, num_experts, 1])
    block, num_blocks, warps = select_blocks(num_tokens)
    matrix = 4.0 * num_tokens * num_gates
    launch(
        serve_kernels.select, (num_gates + 1,),
        rank_GT, score_GT, score_GT if prob_GT is None else prob_GT, flags(padding_T, score_GT),
        score_GT if entropy_T is None else entropy_T, score_GT if log_mass_T is None else log_mass_T,
        count_E, wanted_E, cut_E, ties_E, load_G, coefficient_G, prob_sum_G, totals, num_real,
        num_tokens, num_gates, num_experts, bounds.numerator, bounds.denominator, bounds.least,
        LIMITED=bounds.numerator > 0, LOAD_OF_ALL=load_of_all, HAS_PROB=prob_GT is not None,
        HAS_PADDING=padding_T is not None, BLOCK_T=block, NUM_BLOCKS=num_blocks, num_warps=warps,
        cost=lambda: Cost(2 * matrix, 3 * matrix),
    )  # fmt: skip
    return Selected(count_E, wanted_E, cut_E, ties_E, load_G, coefficient_G, prob_sum_G, totals), num_real[0]


def make_lists(
    rank_GT: Tensor,
    score_GT: Tensor,
    weight: Tensor,
    weight_steps: tuple[int, int],
    selected: Selected,
    most: int,
    bounds: Bounds,
    config: MoEConfig,
) -> tuple[Lists, Tensor]:
    # one function: buffers and launches in their order
    num_experts, num_tokens, device = config.num_experts, rank_GT.size(1), rank_GT.device
    bounds = _affordable(bounds, selected.count_E, num_tokens, config)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    token_R, tile_N3 = ints(bounds.rows), ints(bounds.tiles, 3)
    slot_ET, row_TK = ints(num_experts, num_tokens), ints(num_tokens, most)
    row_end_E, count_T = ints(num_experts), ints(num_tokens)
    weight_R = torch.empty(bounds.rows, device=device)
    matrix = 4.0 * num_tokens * num_experts
    block, num_blocks, warps = place_blocks(num_tokens)
    reads = 2 * matrix * (num_blocks + 1) / 2  # a block reads what is before it, too
    launch(
        serve_kernels.place, (num_experts + 1, num_blocks),
        rank_GT, score_GT, weight, selected.count_E, selected.cut_E, selected.ties_E,
        slot_ET, token_R, weight_R, row_end_E, tile_N3,
        num_tokens, num_experts, bounds.tiles, *weight_steps,
        TILE_ROWS=bounds.tile_rows, BLOCK_T=block, BLOCK_E=power_of_two(num_experts, 2, 1 << 20), num_warps=warps,
        cost=lambda: Cost(3 * matrix + 12.0 * bounds.rows, reads + matrix + 12.0 * bounds.rows),
    )  # fmt: skip
    block_t = token_block(num_experts)
    launch(
        serve_kernels.by_token, (-(-num_tokens // block_t),),
        slot_ET, row_TK, count_T, num_tokens, num_experts, most,
        BLOCK_T=block_t, BLOCK_E=power_of_two(num_experts, 2, 1 << 20), num_warps=4,
        cost=lambda: Cost(matrix + 4.0 * (bounds.rows + num_tokens), matrix + 4.0 * (bounds.rows + num_tokens)),
    )  # fmt: skip
    lists = Lists(
        token_R, row_end_E, tile_N3, slot_ET, row_TK, count_T, selected.count_E, bounds.rows,
        bounds.tile_rows,
    )  # fmt: skip
    return lists, weight_R


def _affordable(bounds: Bounds, count_E: Tensor, num_tokens: int, config: MoEConfig) -> Bounds:
    """Without capacity a token may take every expert: above ROW_LIMIT_BYTES the host asks how many rows there are."""
    row_bytes = 2 * (config.expert_dim + config.embed_dim)
    if bounds.numerator > 0 or bounds.rows * row_bytes <= ROW_LIMIT_BYTES or bounds.rows <= num_tokens:
        return bounds
    rows = max(1, int(count_E.sum()))
    return bounds._replace(rows=rows, tiles=min(rows, -(-rows // bounds.tile_rows) + config.num_experts))
