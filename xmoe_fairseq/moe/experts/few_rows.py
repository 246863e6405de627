"""Compute few rows per expert on a CPU at inference, reading each chosen expert's matrices once at the memory's speed.

A GEMM of a few rows reads its matrix at a third of the memory's rate. The kernels of ``moe/native`` read faster, and
they sum a row in the same order whatever other rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import host
from ..activations import ACTIVATIONS
from ..config import MoEConfig
from ..native.rows import Groups, combine, float_linear, path_for
from ..plan import RoutingPlan

# From this many rows per chosen expert on, GEMMs are faster (measured on a CPU with 512 x 1024: at 20 rows the kernels
# take a third to a half of a GEMM's time, at 40 rows 1.2 times).
MANY_ROWS = 32


def serves(config: MoEConfig, plan: RoutingPlan, x_TD: Tensor, *weights: Tensor) -> bool:
    """True if the kernels compute this plan: no gradient is needed and the rows are few."""
    rows = plan.token_index_A.numel()
    if not rows or config.compute != "auto" or not host.on_cpu(x_TD):
        return False
    if x_TD.dtype not in (torch.float32, torch.bfloat16) or path_for(x_TD) == "torch":
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, *weights)):
        return False
    return rows < MANY_ROWS * int(plan.count_E.count_nonzero())


def expert_sum(x_TD: Tensor, plan: RoutingPlan, weights: list[Tensor], activation: str) -> Tensor:
    """Sum over each token's kept experts of weight * expert(x): (T, D), dtype of ``x_TD``; float32 inside.

    Args:
        weights: w1 (E, D, F), b1 (E, F), w2 (E, F, D), b2 (E, D), all float32 or all bfloat16.
    """
    w1_EDF, b1_EF, w2_EFD, b2_ED = (weight.detach().contiguous() for weight in weights)
    by_token, by_number = groups_of(plan)
    hidden_AF = float_linear(x_TD.detach().float().contiguous(), w1_EDF, b1_EF.float(), by_token)
    hidden_AF = ACTIVATIONS[activation].forward(hidden_AF)
    out_AD = float_linear(hidden_AF, w2_EFD, b2_ED.float(), by_number)
    return combine(out_AD, plan.weight_A.detach().float(), plan.token_index_A, plan.num_tokens).to(x_TD.dtype)


def groups_of(plan: RoutingPlan) -> tuple[Groups, Groups]:
    """The plan's assignments with each token as input row, and with its own number as input row."""
    start_E = plan.count_E.new_zeros(plan.count_E.numel() + 1)
    torch.cumsum(plan.count_E, 0, out=start_E[1:])
    rows = plan.token_index_A.numel()
    return Groups(plan.token_index_A, start_E, rows), Groups(None, start_E, rows)
