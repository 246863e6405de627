"""Compute experts on the rows of a ``DevicePlan``: the host side of grouped.py and combine.py, and their gradients.

For the backward pass autograd keeps the layer's input, pre-activations and weighted hidden units (R, F), as for a dense
FFN, and the lists. Half-precision copies of float32 tensors (autocast) are made for the forward pass and made again for
the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import combine as combine_kernels
from . import grouped as grouped_kernels
from .launch import Cost, launch, reckoned_rows
from .plan import Lists
from .tiles import Tile, outer_tile, power_of_two, row_tile, widens


@dataclass(frozen=True)
class ExpertRule:
    """The settings that are the same in every call: activation, dropout, the dtype to compute in."""

    activation: str
    dropout: float
    dtype: torch.dtype


def expert_sum(
    x_TD: Tensor, weight_R: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, lists: Lists, rule: ExpertRule
) -> Tensor:
    """Sum over each token's rows of weight * expert(x): (T, D) in ``rule.dtype``. Gradients reach all tensors.

    Args:
        x_TD: (T, D). weight_R: float32 (R,). w1 (E, D, F), b1 (E, F), w2 (E, F, D), b2 (E, D), any float dtype.
    """
    # needs_input_grad is True for parameters under no_grad too, so the function gets a flag
    keeps_graph = torch.is_grad_enabled()
    y_TD: Tensor = _ExpertSum.apply(x_TD, weight_R, w1, b1, w2, b2, lists, rule, keeps_graph)
    return y_TD


class _ExpertSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_R: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        lists: Lists,
        rule: ExpertRule,
        keeps_graph: bool,
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        seed = _seed(rule, x_TD.device)
        hidden_RF, pre_RF = _up(
            x_TD.to(rule.dtype), w1.to(rule.dtype), b1, weight_R, lists, rule, seed, save_pre=keeps_graph
        )
        out_RD = _down(hidden_RF, w2.to(rule.dtype), b2, weight_R, lists)
        if keeps_graph:
            ctx.save_for_backward(x_TD, weight_R, w1, b1, w2, b2, pre_RF, hidden_RF, seed)
            ctx.lists, ctx.rule = lists, rule
        return _combine(out_RD, lists, rule.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        x_TD, weight_R, w1, b1, w2, b2, pre_RF, hidden_RF, seed = ctx.saved_tensors
        lists, rule = ctx.lists, ctx.rule
        grad_TD = grad_TD.contiguous()
        grad_pre_RF, hidden_sum, inner_PR = _hidden_backward(
            grad_TD, w2.to(rule.dtype), pre_RF, weight_R, lists, rule, seed
        )
        grad_weight_R, output_sum = _row_weight_backward(grad_TD, b2, weight_R, inner_PR, lists)
        grad_b1, grad_b2 = _bias_gradients(hidden_sum, output_sum, b1, b2, lists)
        grad_w2 = _weight_gradient(hidden_RF, grad_TD, w2, lists, gather="right")
        grad_w1 = _weight_gradient(x_TD.to(rule.dtype), grad_pre_RF, w1, lists, gather="left")
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_RD = _down(grad_pre_RF, w1.to(rule.dtype).transpose(1, 2), None, weight_R, lists)
            grad_x = _combine(grad_RD, lists, x_TD.dtype)
        return grad_x, grad_weight_R, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None


def _seed(rule: ExpertRule, device: torch.device) -> Tensor | None:
    """A seed from the device's generator, which activation checkpointing restores; None without dropout."""
    return torch.randint(2**31, (1,), device=device) if rule.dropout else None


def _dot(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tile_constants(tile: Tile, num_k: int, dtype: torch.dtype) -> dict[str, Any]:
    constants = {
        "EVEN_K": num_k % tile.k == 0, "DOT": _dot(dtype), "WIDEN": widens(dtype),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return constants if tile.registers is None else {**constants, "maxnreg": tile.registers}


def _up(
    x_TD: Tensor,
    w1: Tensor,
    b1: Tensor,
    weight_R: Tensor,
    lists: Lists,
    rule: ExpertRule,
    seed: Tensor | None,
    *,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    """Hidden units times the row's weight (R, F); pre-activations (R, F) if they are kept, else the same buffer."""
    _, width, num_hidden = w1.shape
    tile = row_tile(lists.tile_rows, num_hidden, width, x_TD.dtype, most_n=128)
    hidden_RF = x_TD.new_empty(lists.max_rows, num_hidden)
    pre_RF = torch.empty_like(hidden_RF) if save_pre else hidden_RF
    num_n = -(-num_hidden // tile.n)
    launch(
        grouped_kernels.expert_up, (lists.num_tiles * num_n,),
        x_TD, w1, b1, weight_R, pre_RF, hidden_RF, lists.token_R, lists.tile_N3,
        x_TD if seed is None else seed, width, num_hidden, rule.dropout,
        ACTIVATION=rule.activation, SAVE_PRE=save_pre, HAS_DROPOUT=seed is not None, PARTS=tile.parts,
        **_tile_constants(tile, width, x_TD.dtype),
        cost=lambda: _product_cost(lists, tile, num_hidden, width, x_TD, stored=2 if save_pre else 1),
    )  # fmt: skip
    return hidden_RF, pre_RF


def _down(rows_RK: Tensor, weight: Tensor, bias: Tensor | None, weight_R: Tensor, lists: Lists) -> Tensor:
    """Rows times their experts' matrices (E, K, N), with bias and weight if there is a bias: (R, N)."""
    num_k, num_n = weight.shape[1:]
    tile = row_tile(lists.tile_rows, num_n, num_k, rows_RK.dtype)
    out_RN = rows_RK.new_empty(lists.max_rows, num_n)
    launch(
        grouped_kernels.rows_times_experts, (lists.num_tiles * -(-num_n // tile.n),),
        rows_RK, weight, weight if bias is None else bias, weight_R, out_RN,
        lists.tile_N3, num_k, num_n, *weight.stride(), HAS_BIAS=bias is not None,
        **_tile_constants(tile, num_k, rows_RK.dtype),
        cost=lambda: _product_cost(lists, tile, num_n, num_k, rows_RK, stored=1),
    )  # fmt: skip
    return out_RN


def _combine(rows_RD: Tensor, lists: Lists, dtype: torch.dtype) -> Tensor:
    """The sum of each token's rows: (T, D) in ``dtype``."""
    width = rows_RD.size(1)
    y_TD = rows_RD.new_empty(lists.num_tokens, width, dtype=dtype)
    block = power_of_two(width, 32, 1024)
    moved = float((reckoned_rows(lists.max_rows) + lists.num_tokens) * width * y_TD.element_size())
    launch(
        combine_kernels.combine_rows, (lists.num_tokens, -(-width // block)),
        rows_RD, lists.row_TK, lists.count_T, y_TD, width, lists.row_TK.size(1), BLOCK_D=block,
        num_warps=max(1, min(4, block // 256)), cost=lambda: Cost(moved, moved),
    )  # fmt: skip
    return y_TD


def _hidden_backward(
    grad_TD: Tensor,
    w2: Tensor,
    pre_RF: Tensor,
    weight_R: Tensor,
    lists: Lists,
    rule: ExpertRule,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the pre-activations (R, F), its sums over the rows of each tile, parts of the weights' gradient."""
    _, num_hidden, width = w2.shape
    tile = row_tile(lists.tile_rows, num_hidden, width, pre_RF.dtype, most_n=64)
    tiles, parts = lists.num_tiles, -(-num_hidden // tile.n)
    grad_pre_RF = torch.empty_like(pre_RF)
    hidden_sum = torch.empty(tiles, num_hidden, device=pre_RF.device)
    inner_PR = torch.empty(parts, lists.max_rows, device=pre_RF.device)
    launch(
        grouped_kernels.hidden_backward, (tiles * parts,),
        grad_TD, w2, pre_RF, weight_R, grad_pre_RF, inner_PR, hidden_sum,
        lists.token_R, lists.tile_N3, pre_RF if seed is None else seed,
        width, num_hidden, rule.dropout, lists.max_rows, ACTIVATION=rule.activation, HAS_DROPOUT=seed is not None,
        **_tile_constants(tile, width, pre_RF.dtype),
        cost=lambda: _product_cost(lists, tile, num_hidden, width, pre_RF, stored=2),
    )  # fmt: skip
    return grad_pre_RF, hidden_sum, inner_PR


def _row_weight_backward(
    grad_TD: Tensor, b2: Tensor, weight_R: Tensor, inner_PR: Tensor, lists: Lists
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows' weights, and the sums of weight * ``grad_TD`` over the rows of each tile (tiles, D)."""
    width, tiles = b2.size(1), lists.num_tiles
    grad_weight_R = torch.empty(lists.max_rows, device=b2.device)
    output_sum = torch.empty(tiles, width, device=b2.device)
    rows = reckoned_rows(lists.max_rows)
    moved = float(rows * (width * grad_TD.element_size() + 4 * inner_PR.size(0)) + output_sum.nbytes)
    launch(
        combine_kernels.row_weight_backward, (tiles,),
        grad_TD, b2, weight_R, inner_PR, lists.token_R, lists.tile_N3,
        grad_weight_R, output_sum, width, lists.max_rows, inner_PR.size(0),
        BLOCK_P=16, BLOCK_M=lists.tile_rows, BLOCK_D=power_of_two(width, 16, 64),
        num_warps=power_of_two(lists.tile_rows // 16, 1, 8), cost=lambda: Cost(moved, moved),
    )  # fmt: skip
    return grad_weight_R, output_sum


def _bias_gradients(
    hidden_sum: Tensor, output_sum: Tensor, b1: Tensor, b2: Tensor, lists: Lists
) -> tuple[Tensor, Tensor]:
    (num_experts, num_hidden), width = b1.shape, b2.size(1)
    grad_b1, grad_b2 = torch.empty_like(b1), torch.empty_like(b2)
    block = power_of_two(max(num_hidden, width), 16, 256)
    moved = float(hidden_sum.nbytes + output_sum.nbytes)
    launch(
        combine_kernels.bias_gradients, (num_experts, -(-num_hidden // block) - (-width // block)),
        hidden_sum, output_sum, lists.count_E, grad_b1, grad_b2, num_hidden, width, num_experts,
        TILE_ROWS=lists.tile_rows, BLOCK_E=power_of_two(num_experts, 2, 1 << 20), BLOCK_N=block, num_warps=2,
        cost=lambda: Cost(moved, moved),
    )  # fmt: skip
    return grad_b1, grad_b2


def _weight_gradient(left: Tensor, right: Tensor, like: Tensor, lists: Lists, *, gather: str) -> Tensor:
    """Gradient of ``like`` (E, M, N), in its dtype; the operand named by ``gather`` is indexed by token."""
    num_experts, num_m, num_n = like.shape
    tile = outer_tile(num_m, num_n, left.dtype)
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    blocks_m, blocks_n = -(-num_m // tile.m), -(-num_n // tile.n)
    rows, size = reckoned_rows(lists.max_rows), left.element_size()
    written = float(grad.numel() * grad.element_size())
    launch(
        grouped_kernels.weight_gradient, (blocks_m * blocks_n, num_experts),
        left, right, grad, lists.token_R, lists.row_end_E, num_m, num_n,
        GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right",
        EVEN=num_m % tile.m == 0 and num_n % tile.n == 0, DOT=_dot(left.dtype), WIDEN=widens(left.dtype),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_R=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        cost=lambda: Cost(
            rows * (num_m + num_n) * size + written,
            rows * (num_m * blocks_n + num_n * blocks_m) * size + written,
            2.0 * rows * num_m * num_n,
        ),
    )  # fmt: skip
    return grad


def _product_cost(lists: Lists, tile: Tile, num_n: int, num_k: int, rows: Tensor, *, stored: int) -> Cost:
    """Rows (R, K) times matrices (E, K, N); ``stored``: row buffers (R, N) that the epilogue reads or writes."""
    count, size = reckoned_rows(lists.max_rows), rows.element_size()
    # for an even load; an uneven one has up to one tile more for each expert, and few rows need fewer experts
    experts = max(1, min(lists.num_experts, count))
    rows_each = (count + experts - 1) // experts
    tiles = experts * ((rows_each + tile.m - 1) // tile.m)
    matrices, stores = experts * num_k * num_n * size, stored * count * num_n * size
    return Cost(
        count * num_k * size + matrices + stores,
        count * num_k * size * -(-num_n // tile.n) + tiles * num_k * num_n * size + stores,
        2.0 * count * num_k * num_n,
    )
