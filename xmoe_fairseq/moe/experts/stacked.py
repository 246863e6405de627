"""The experts: many small feed-forward networks with stacked weights, computed together.

There are four ways to compute the same sums. ``choose_path`` picks one by measured rules:

    bmm      pads rows to the fullest expert for one batched GEMM. It is best on CPUs when loads are even, as in
             training, where capacity fills most experts.
    loop     runs one GEMM per expert that has rows, for uneven loads and few rows, as in incremental decoding.
    grouped  runs torch's grouped GEMM over ragged groups, in bfloat16 on GPUs from compute capability 9.0 (H100) on.
    masked   computes all experts on all tokens, with weight 0 where a pair is not kept. It is for experts so small, or
             choices so many, that gathering a row costs more than computing it (dense-as-XMoE at t = 1).

At inference on a CPU few rows per expert go through kernels of our own (few_rows.py).

In the first three, gather, experts and combine are one autograd function. It keeps the layer's input and the
pre-activations, T x D + R x F numbers. It keeps neither gathered inputs nor expert outputs (the idea of SonicMoE, arXiv
2512.14080): the backward pass gathers the inputs again, and computes the gradient of a routing weight as the inner
product of an expert's hidden units with their gradient. Thus memory does not grow with granularity at fixed FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import host, kernels
from ..activations import ACTIVATIONS, Activation
from ..compiling import not_compiled
from ..config import MoEConfig
from ..plan import RoutingPlan
from . import few_rows
from .layouts import LAYOUTS, RowLayout, groupable, has_grouped_kernel

# Gathering and combining one row takes as long as computing this many hidden units (CPU, float32).
GATHER_UNITS = 42
# Costs on a CPU in rows of a GEMM: reading a matrix (half precision: 1.5 times as much, since its rows take a third of
# the time), and each further thread for a GEMM of its own. Such a GEMM also has a fixed cost, here in multiply-adds.
# Fitted to 256 to 8192 tokens, 8 x 4096 to 128 x 512 and 32 x 128, one and two threads, float32 and bfloat16.
MATRIX_ROWS, HALF_MATRIX_ROWS, ROWS_PER_THREAD, CALL_COST = 22, 33, 11, 800_000
# On a GPU without a grouped kernel one batched GEMM may compute so many rows for each real one, or so many in all.
PADDING, FEW_ROWS = 4, 16384
# torch's grouped GEMM takes fewer groups than this.
MOST_GROUPS = 1024
# Size of a block of rows that stays in one core's second-level cache through a few elementwise passes.
BLOCK_BYTES = 512 << 10


class Experts(nn.Module):
    """E independent two-layer networks: expert e is ``activation(x @ w1[e] + b1[e]) @ w2[e] + b2[e]``.

    State: ``w1`` (E, D, F), ``b1`` (E, F), ``w2`` (E, F, D), ``b2`` (E, D). Each expert is initialised by itself, as
    two ``nn.Linear`` layers are.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        shapes = self.state_shapes(config)
        self.w1, self.b1, self.w2, self.b2 = (nn.Parameter(torch.empty(shape)) for shape in shapes.values())
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            fan_in = weight.size(1)
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    @classmethod
    def state_shapes(cls, config: MoEConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything in the state dict."""
        experts, width, hidden = config.num_experts, config.embed_dim, config.expert_dim
        return {
            "w1": (experts, width, hidden),
            "b1": (experts, hidden),
            "w2": (experts, hidden, width),
            "b2": (experts, width),
        }

    # a graph break, because row counts depend on data and would recompile the graph
    @not_compiled
    def forward(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """Sum over each token's kept experts of weight * expert(x): (T, D), dtype of ``x_TD`` or of autocast."""
        dtype = compute_dtype(x_TD)
        if kernels.chosen(self.config, x_TD.device, dtype, self.training):
            return kernels.expert_sum(self, x_TD, plan, dtype)
        x_TD, *weights = (tensor.to(dtype) for tensor in (x_TD, self.w1, self.b1, self.w2, self.b2))
        if not self.training and few_rows.serves(self.config, plan, x_TD, *weights):
            return few_rows.expert_sum(x_TD, plan, weights, self.config.activation)
        path = choose_path(self.config, plan, dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            if path == "masked":
                return self._masked(x_TD, plan, weights)
            dropout = self.config.activation_dropout if self.training else 0.0
            layout = LAYOUTS[path if plan.token_index_A.numel() else "loop"](plan)
            # needs_input_grad is True for parameters under no_grad too, so the function gets a flag
            keeps_graph = torch.is_grad_enabled()
            arguments = (x_TD, plan.weight_A, *weights, layout, self.config.activation, dropout, keeps_graph)
            return cast(Tensor, _ExpertSum.apply(*arguments))

    def in_float(self, expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float32 w1 (D, F), b1 (F,), w2 (F, D), b2 (D,) of one expert."""
        w1, b1, w2, b2 = (tensor[expert].float() for tensor in (self.w1, self.b1, self.w2, self.b2))
        return w1, b1, w2, b2

    def _masked(self, x_TD: Tensor, plan: RoutingPlan, weights: list[Tensor]) -> Tensor:
        """Every expert on every token, as one dense FFN of E x F hidden units, with unkept weights 0."""
        w1_EDF, b1_EF, w2_EFD, b2_ED = weights
        num_experts, width, hidden = w1_EDF.shape
        weight_TE = plan.weight_A.new_zeros(plan.num_tokens, num_experts)
        weight_TE = weight_TE.index_put((plan.token_index_A, plan.expert_index_A), plan.weight_A).to(x_TD.dtype)
        pre = torch.addmm(b1_EF.reshape(-1), x_TD, w1_EDF.permute(1, 0, 2).reshape(width, num_experts * hidden))
        hidden_TEF = ACTIVATIONS[self.config.activation].forward(pre).view(-1, num_experts, hidden)
        if self.training and self.config.activation_dropout:
            hidden_TEF = nn.functional.dropout(hidden_TEF, self.config.activation_dropout)
        weighted = (hidden_TEF * weight_TE.unsqueeze(-1)).view(-1, num_experts * hidden)
        return weighted @ w2_EFD.reshape(num_experts * hidden, width) + weight_TE @ b2_ED


def choose_path(config: MoEConfig, plan: RoutingPlan, dtype: torch.dtype) -> str:
    """Name of the way to compute this plan; ``config.compute`` overrides the rules.

    Where torch has a grouped kernel the rules read only shapes. Elsewhere they read the counts of rows, which on a GPU
    waits for the device; torch's loop in place of the kernel waits as well.
    """
    if config.compute == "grouped" and not groupable(config.embed_dim, config.expert_dim, dtype=dtype):
        raise ValueError(
            f"moe_compute grouped cannot multiply {dtype} matrices of {config.embed_dim} x {config.expert_dim}: "
            "torch's grouped GEMM takes half and single precision and rows of whole 16 bytes; choose auto, bmm or loop"
        )
    if config.compute != "auto":
        return config.compute
    rows = plan.token_index_A.numel()
    pairs = plan.num_tokens * config.num_experts
    if rows * (config.expert_dim + GATHER_UNITS) >= pairs * config.expert_dim and rows > 0:
        return "masked"
    fits = groupable(config.embed_dim, config.expert_dim, dtype=dtype) and config.num_experts < MOST_GROUPS
    if fits and has_grouped_kernel(plan.token_index_A.device, dtype):
        return "grouped"
    fullest = int(plan.count_E.max())
    if not host.on_cpu(plan.count_E):  # a GEMM for each expert costs launches
        return "bmm" if config.num_experts * fullest <= PADDING * rows + FEW_ROWS else "loop"
    is_half = dtype.itemsize < torch.float32.itemsize
    matrix = HALF_MATRIX_ROWS if is_half else MATRIX_ROWS
    call = (3 if is_half else 1) * CALL_COST / (config.embed_dim * config.expert_dim)
    batched = config.num_experts * (matrix + fullest)
    start = matrix + ROWS_PER_THREAD * (torch.get_num_threads() - 1) + call
    return "bmm" if batched <= int(plan.count_E.count_nonzero()) * start + rows else "loop"


def compute_dtype(x_TD: Tensor) -> torch.dtype:
    """The dtype that linear maps compute in: autocast's where it is on, else that of ``x_TD``."""
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x_TD.dtype


class _ExpertSum(torch.autograd.Function):
    """Gather, experts, combine. The module's docstring says which tensors it keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_A: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        layout: RowLayout,
        activation: str,
        dropout: float,
        keeps_graph: bool,
    ) -> Tensor:
        pre_RF = layout.linear(layout.gather(x_TD), w1, b1)
        keep_RF = _dropout_scale(pre_RF, dropout)
        hidden_RF = _hidden(pre_RF, keep_RF, ACTIVATIONS[activation], in_place=not keeps_graph)
        if keeps_graph:
            ctx.save_for_backward(x_TD, weight_A, w1, b1, w2, b2, pre_RF, keep_RF)
            ctx.layout, ctx.activation = layout, activation
        return layout.combine(layout.linear(hidden_RF, w2, b2), weight_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_A, w1, _, w2, b2, pre_RF, keep_RF = ctx.saved_tensors
        layout, activation = ctx.layout, ACTIVATIONS[ctx.activation]
        weight_R = layout.spread(weight_A)
        grad_RD = layout.gather(grad_TD.contiguous())
        grad_RF = layout.input_gradient(grad_RD, w2)
        hidden_RF, inner_R = _hidden_backward_(pre_RF, keep_RF, grad_RF, weight_R, activation)
        # y = weight * (hidden @ w2 + b2), so the gradient of the weight has a part from each summand
        grad_weight_A = layout.collect(inner_R + layout.bias_inner(grad_RD, b2)).to(weight_A.dtype)
        grad_b2 = layout.bias_gradient(grad_RD, weight_R)
        grad_w2 = layout.weight_gradient(hidden_RF, grad_RD)
        del hidden_RF, grad_RD
        grad_w1 = layout.weight_gradient(layout.gather(x_TD), grad_RF)
        grad_b1 = layout.bias_gradient(grad_RF)
        grad_x = layout.combine(layout.input_gradient(grad_RF, w1), None) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight_A, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None, None


def _hidden(pre_RF: Tensor, keep_RF: Tensor | None, activation: Activation, *, in_place: bool) -> Tensor:
    """Hidden units from pre-activations; ``in_place`` overwrites the latter."""
    hidden_RF = pre_RF if in_place else torch.empty_like(pre_RF)
    for rows in _row_blocks(pre_RF):
        activation.forward_into(pre_RF[rows], hidden_RF[rows])
    return hidden_RF if keep_RF is None else hidden_RF.mul_(keep_RF)


def _hidden_backward_(
    pre_RF: Tensor, keep_RF: Tensor | None, grad_RF: Tensor, weight_R: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """All elementwise work between the two linear maps, block by block so that a block stays in the cache.

    Args:
        grad_RF: gradient of the hidden units before the routing weight; overwritten with the gradient of ``pre_RF``.
    Returns:
        the hidden units times their routing weight (for the gradient of w2), and (R,), float32 or wider: the inner
        product of hidden units and gradient (for the gradient of the routing weight).
    """
    hidden_RF = torch.empty_like(pre_RF)
    sum_dtype = torch.promote_types(pre_RF.dtype, torch.float32)
    inner_R = torch.empty(pre_RF.size(0), dtype=sum_dtype, device=pre_RF.device)
    for rows in _row_blocks(pre_RF):
        weight_R1 = weight_R[rows].unsqueeze(-1).to(pre_RF.dtype)
        hidden, grad = hidden_RF[rows], grad_RF[rows]
        activation.forward_into(pre_RF[rows], hidden)
        if keep_RF is not None:
            hidden.mul_(keep_RF[rows])
        torch.sum(hidden * grad, dim=-1, dtype=sum_dtype, out=inner_R[rows])
        hidden.mul_(weight_R1)
        if keep_RF is not None:
            grad.mul_(keep_RF[rows])  # after the inner product, in which hidden has the dropout already
        activation.backward_(grad.mul_(weight_R1), pre_RF[rows])
    return hidden_RF, inner_R


def _row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the first axis: on a CPU small enough for the cache; on a GPU one, because each launch costs time."""
    step = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes)) if host.on_cpu(rows) else max(1, rows.size(0))
    for start in range(0, rows.size(0), step):
        yield slice(start, start + step)


def _dropout_scale(like: Tensor, probability: float) -> Tensor | None:
    if probability == 0:
        return None
    return torch.empty_like(like).bernoulli_(1 - probability).div_(1 - probability)
