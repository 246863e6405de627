"""From tokens to a ``DevicePlan``: the host side of gate.py, route.py and serve.py, and their gradients.

``route`` serves the routers that declare a ``KernelRule``; ``plan_choices`` takes the choices of any other router, made
with torch. Neither reads a value of the device, with one exception: without capacity a token may take many experts, and
if the static bound of rows would take more than ``serving.ROW_LIMIT_BYTES``, the host waits once for the number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import MoEConfig
from ..plan import Choices
from ..routers.router import KernelRule
from . import few as few_kernels
from . import route as route_kernels
from . import serve as serve_kernels
from .gating import flags, gate_input_gradient, gate_logits, gate_precision, gate_weight_gradient
from .launch import Cost, launch
from .plan import DevicePlan, DeviceTerms, Lists
from .serving import Bounds, Selected, by_expert, capacity_bounds, make_lists, select_served
from .tiles import few_blocks, power_of_two, route_blocks, token_block, widens

UNITS = 2**53  # probabilities are summed in units of its inverse


def route(
    x_TD: Tensor,
    gate_GD: Tensor,
    padding_T: Tensor | None,
    rule: KernelRule,
    config: MoEConfig,
    training: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, DevicePlan]:
    """Plan for tokens (T, D), routed by the weights of a gate (G, D). Gradients reach both.

    Returns ``x_TD`` too, for the experts, so that one kernel adds the gate's gradient to theirs.

    Args:
        x_TD: float32, bfloat16 or float16. padding_T: bool, True at padding; None when nothing is padding.
        dtype: the dtype in which the experts compute; None: that of ``x_TD``.
    """
    bounds = capacity_bounds(config, x_TD.size(0), rule.most, training, dtype or x_TD.dtype)
    kept: list[Any] = []
    blocks = few_blocks(x_TD.size(0), rule.num_gates)
    if blocks is not None and bounds.numerator == 0 and not training and not torch.is_grad_enabled():
        weight_R = _route_few(x_TD.contiguous(), gate_GD, padding_T, rule, config, bounds, blocks, kept)
        prob_sum_G, square = kept[1].prob_sum_G, kept[1].totals[2]
    else:
        x_TD, weight_R, prob_sum_G, square = _Route.apply(x_TD, gate_GD, padding_T, rule, config, bounds, kept)
    lists, selected, num_real = kept
    z_loss = config.z_loss_weight * square if config.z_loss_weight > 0 else None
    return x_TD, DevicePlan(
        lists=lists,
        weight_R=weight_R,
        wanted_E=selected.wanted_E,
        num_real_tokens=num_real,
        balance=DeviceTerms(selected.load_G, prob_sum_G, selected.totals[0], selected.coefficient_G),
        entropy=selected.totals[1],
        z_loss=z_loss,
        row_cost=config.row_cost,
        capacity_of=_capacity_of(config, training),
    )


def plan_choices(
    choices: Choices, padding_T: Tensor | None, config: MoEConfig, training: bool, dtype: torch.dtype
) -> DevicePlan:
    """Plan from choices that a router made with torch; the gradient reaches ``choices.weight_TE``."""
    num_tokens, most = choices.expert_TK.shape
    bounds = capacity_bounds(config, num_tokens, most, training, dtype)
    kept: list[Any] = []
    weight_R = _Serve.apply(choices.weight_TE, choices, padding_T, config, bounds, kept)
    lists, selected, num_real = kept
    return DevicePlan(
        lists=lists,
        weight_R=weight_R,
        wanted_E=selected.wanted_E,
        num_real_tokens=num_real,
        balance=choices.balance,
        entropy=choices.entropy,
        z_loss=choices.z_loss,
        row_cost=config.row_cost,
        capacity_of=_capacity_of(config, training),
    )


def _capacity_of(config: MoEConfig, training: bool) -> Any:
    return None if config.capacity_fraction(training) is None else lambda tokens: config.capacity(tokens, training)


def _route_few(
    x_TD: Tensor,
    gate_GD: Tensor,
    padding_T: Tensor | None,
    rule: KernelRule,
    config: MoEConfig,
    bounds: Bounds,
    blocks: tuple[int, int, int],
    kept: list[Any],
) -> Tensor:
    """As ``_Route`` without gradient, in one launch, for tokens and gates that fit into one program."""
    # one function: buffers and a launch
    (num_tokens, width), num_gates, num_experts = x_TD.shape, rule.num_gates, config.num_experts
    device, most = x_TD.device, min(rule.most, num_experts)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    # tensors whose size depends on T are not parts of one buffer: a kernel is compiled anew for other alignments
    token_R, tile_N3 = ints(bounds.rows), ints(bounds.tiles, 3)
    row_TK, count_T = ints(num_tokens, most), ints(num_tokens)
    row_end_E, weight_R = ints(num_experts), torch.empty(bounds.rows, device=device)
    counts = torch.empty(2 * num_experts + 1, dtype=torch.int64, device=device)
    count_E, wanted_E, num_real = counts.split([num_experts, num_experts, 1])
    load_G, coefficient_G, prob_sum_G, totals = (torch.empty(size, device=device) for size in (*3 * [num_gates], 3))
    block_t, block_g, warps = blocks
    moved = float(x_TD.nbytes + gate_GD.nbytes + 8 * bounds.rows)
    launch(
        few_kernels.route_few, (1,),
        x_TD, gate_GD.contiguous(), flags(padding_T, x_TD),
        token_R, weight_R, row_end_E, tile_N3, row_TK, count_T, count_E, wanted_E,
        load_G, coefficient_G, prob_sum_G, totals, num_real,
        num_tokens, width, num_gates, num_experts, _threshold_units(rule.threshold), rule.most, most, bounds.tiles,
        BY_THRESHOLD=rule.threshold is not None, NORMALIZE=rule.normalize, LOAD_OF_ALL=rule.load_of_all,
        HAS_PADDING=padding_T is not None, GATE_BITS=max(1, (num_gates - 1).bit_length()),
        PRECISION=gate_precision(x_TD.dtype), WIDEN=widens(x_TD.dtype), TILE_ROWS=bounds.tile_rows,
        BLOCK_T=block_t, BLOCK_G=block_g, BLOCK_D=power_of_two(width, 16, 32), num_warps=warps, num_stages=3,
        cost=lambda: Cost(moved, moved, 2.0 * num_tokens * num_gates * width),
    )  # fmt: skip
    lists = Lists(
        token_R, row_end_E, tile_N3, ints(0), row_TK, count_T, count_E, bounds.rows, bounds.tile_rows,
    )  # fmt: skip
    none_E = count_E.new_empty(0)
    kept += [lists, Selected(count_E, wanted_E, none_E, none_E, load_G, coefficient_G, prob_sum_G, totals), num_real[0]]
    return weight_R


class _Route(torch.autograd.Function):
    """Weights of the rows, probability sums and the mean of log_mass^2, with gradient; lists and counts in ``kept``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_GD: Tensor,
        padding_T: Tensor | None,
        rule: KernelRule,
        config: MoEConfig,
        bounds: Bounds,
        kept: list[Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # one function: buffers and launches in their order
        given, x_TD = x_TD, x_TD.contiguous()
        logits = gate_logits(x_TD, gate_GD, padding_T)
        num_tokens, num_gates, num_experts = x_TD.size(0), rule.num_gates, config.num_experts
        prob_GT = torch.empty(num_gates, num_tokens, device=x_TD.device)
        rank_GT = torch.empty(num_gates, num_tokens, dtype=torch.int32, device=x_TD.device)
        weight_ET = torch.empty(num_experts, num_tokens, device=x_TD.device) if rule.normalize else prob_GT
        entropy_T, log_mass_T = (torch.empty(num_tokens, device=x_TD.device) for _ in range(2))
        block_t, block_g = route_blocks(num_gates)
        matrix = 4.0 * num_tokens * num_gates
        launch(
            route_kernels.route_forward, (-(-num_tokens // block_t),),
            logits, flags(padding_T, logits), prob_GT, weight_ET, rank_GT, entropy_T, log_mass_T,
            num_tokens, num_gates, num_experts, _threshold_units(rule.threshold), rule.most,
            BY_THRESHOLD=rule.threshold is not None, NORMALIZE=rule.normalize, HAS_PADDING=padding_T is not None,
            HAS_NULLS=num_gates > num_experts,
            GATE_BITS=max(1, (num_gates - 1).bit_length()), BLOCK_T=block_t, BLOCK_G=block_g, num_warps=4,
            cost=lambda: Cost(matrix * 3, matrix * 4),
        )  # fmt: skip
        selected, num_real = select_served(
            rank_GT, prob_GT, prob_GT, padding_T, entropy_T, log_mass_T, num_experts, bounds, rule.load_of_all
        )
        if rule.load_of_all and num_gates > num_experts:
            # AdaMoE's Eq 6: each null gate gets the mean load of the null gates
            for values_G in (selected.load_G, selected.coefficient_G):
                values_G[num_experts:] = values_G[num_experts:].mean()
        lists, weight_R = make_lists(
            rank_GT, prob_GT, weight_ET, (num_tokens, 1), selected, min(rule.most, num_experts), bounds, config
        )
        kept += [lists, selected, num_real]
        ctx.save_for_backward(x_TD, gate_GD, padding_T, prob_GT, rank_GT, lists.slot_ET, log_mass_T, selected.totals)
        ctx.rule, ctx.num_experts, ctx.max_rows = rule, num_experts, lists.max_rows
        ctx.set_materialize_grads(False)
        return given, weight_R, selected.prob_sum_G, selected.totals[2]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_x: Tensor | None,
        grad_weight_R: Tensor | None,
        grad_sum_G: Tensor | None,
        grad_square: Tensor | None,
    ) -> tuple[Any, ...]:
        x_TD, gate_GD, padding_T, prob_GT, rank_GT, slot_ET, log_mass_T, totals = ctx.saved_tensors
        grad_weight_R = prob_GT.new_zeros(ctx.max_rows) if grad_weight_R is None else grad_weight_R
        grad_sum_G = prob_GT.new_zeros(prob_GT.size(0)) if grad_sum_G is None else grad_sum_G
        num_gates, num_tokens = prob_GT.shape
        grad_logits = torch.empty(num_tokens, num_gates, device=x_TD.device)
        block_t = token_block(num_gates)
        has_z_loss = grad_square is not None
        scale = grad_sum_G if grad_square is None else grad_square / totals[0].clamp(min=1)
        matrix = 4.0 * num_tokens * num_gates
        launch(
            route_kernels.route_backward, (-(-num_tokens // block_t),),
            prob_GT, rank_GT, slot_ET, flags(padding_T, prob_GT), log_mass_T,
            grad_weight_R.contiguous(), grad_sum_G.contiguous(), scale, grad_logits,
            num_tokens, num_gates, ctx.num_experts,
            NORMALIZE=ctx.rule.normalize, HAS_Z_LOSS=has_z_loss, HAS_PADDING=padding_T is not None,
            BLOCK_T=block_t, BLOCK_G=power_of_two(num_gates, 2, 1 << 20), num_warps=4,
            cost=lambda: Cost(matrix * 3 + 4.0 * grad_weight_R.numel(), matrix * 3 + 4.0 * grad_weight_R.numel()),
        )  # fmt: skip
        if ctx.needs_input_grad[0]:
            grad_x = gate_input_gradient(grad_logits, gate_GD, x_TD, grad_x)
        grad_gate = gate_weight_gradient(grad_logits, x_TD, gate_GD, padding_T) if ctx.needs_input_grad[1] else None
        return grad_x, grad_gate, None, None, None, None, None


class _Serve(torch.autograd.Function):
    """Weights of the rows from the weights of all pairs (T, E); lists and counts in ``kept``."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_TE: Tensor,
        choices: Choices,
        padding_T: Tensor | None,
        config: MoEConfig,
        bounds: Bounds,
        kept: list[Any],
    ) -> Tensor:
        num_experts = weight_TE.size(1)
        rank_ET, score_ET = by_expert(choices, num_experts)
        selected, num_real = select_served(
            rank_ET, score_ET, None, padding_T, None, None, num_experts, bounds, load_of_all=False
        )
        steps = (weight_TE.stride(1), weight_TE.stride(0))
        lists, weight_R = make_lists(
            rank_ET, score_ET, weight_TE, steps, selected, choices.expert_TK.size(1), bounds, config
        )
        kept += [lists, selected, num_real]
        ctx.slot_ET = lists.slot_ET
        return weight_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight_R: Tensor) -> tuple[Any, ...]:
        num_experts, num_tokens = ctx.slot_ET.shape
        grad_TE = torch.empty(num_tokens, num_experts, device=grad_weight_R.device)
        block_t = token_block(num_experts)
        matrix = 4.0 * num_tokens * num_experts
        launch(
            serve_kernels.weight_of_pairs, (-(-num_tokens // block_t),),
            grad_weight_R.contiguous(), ctx.slot_ET, grad_TE, num_tokens, num_experts,
            BLOCK_T=block_t, BLOCK_E=power_of_two(num_experts, 2, 1 << 20), num_warps=4,
            cost=lambda: Cost(2 * matrix, 2 * matrix),
        )  # fmt: skip
        return grad_TE, None, None, None, None, None


def _threshold_units(threshold: float | None) -> int:
    """The mass to reach as an integer; at 1 it is above the possible sum, so that rounding loses no expert."""
    if threshold is None:
        return 0
    return UNITS * 2 if threshold >= 1.0 else math.ceil(threshold * UNITS)
