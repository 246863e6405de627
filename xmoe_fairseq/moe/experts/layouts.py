"""Dispatch and combine: gather token rows by expert, sum expert outputs by token.

``TokenRows`` knows the row of each assignment of a plan. A ``RowLayout`` also multiplies the rows with their experts'
matrices. A layout has R = A rows, or R = E x C where rows are padded to the fullest expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from ..plan import RoutingPlan


class TokenRows:
    """One row per assignment, in the plan's order.

    Attributes:
        token_R: int64, the token of each row.
        slot_A: int64, the row of each assignment; None if assignment a is row a.
    """

    def __init__(self, plan: RoutingPlan) -> None:
        self.plan = plan
        self.num_tokens = plan.num_tokens
        self.token_R = plan.token_index_A
        self.slot_A: Tensor | None = None

    def gather(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (R, D)."""
        return x_TD.index_select(0, self.token_R)

    def combine(self, out_RD: Tensor, weight_A: Tensor | None) -> Tensor:
        """Sum each token's rows, scaled by ``weight_A`` (None: by 1): (R, D) -> (T, D). Deterministic.

        ``embedding_bag`` sums the rows of a token without writing scaled copies. ``index_add_`` is ten times as slow on
        a CPU and not deterministic on CUDA.
        """
        order_A, start_T = self._by_token
        weight = None if weight_A is None else weight_A.index_select(0, order_A).to(out_RD.dtype)
        slot_A = order_A if self.slot_A is None else self.slot_A.index_select(0, order_A)
        return torch.nn.functional.embedding_bag(slot_A, out_RD, start_T, mode="sum", per_sample_weights=weight)

    @cached_property
    def _by_token(self) -> tuple[Tensor, Tensor]:
        """int64 (A,) and (T,): assignments by token, and where each token's begin; the backward pass needs them too."""
        order_A = torch.argsort(self.plan.token_index_A, stable=True)
        count_T = self.plan.experts_per_token_T
        return order_A, count_T.cumsum(0) - count_T


class RowLayout(TokenRows, ABC):
    """Rows and their products with the experts' matrices. All layouts compute the same; their speed differs."""

    @abstractmethod
    def linear(self, in_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        """Each row times its expert's matrix, plus its bias: (R, O)."""

    @abstractmethod
    def input_gradient(self, grad_RO: Tensor, weight_EIO: Tensor) -> Tensor:
        """Each row's gradient times its expert's transposed matrix: (R, I)."""

    @abstractmethod
    def weight_gradient(self, in_RI: Tensor, grad_RO: Tensor) -> Tensor:
        """Sum over an expert's rows of the outer products: (E, I, O); 0 for an expert without rows."""

    def spread(self, value_A: Tensor) -> Tensor:
        """(A,) -> (R,): the value of each row's assignment; 0 for padding rows."""
        return value_A

    def collect(self, value_R: Tensor) -> Tensor:
        """(R,) -> (A,): the value of each assignment's row."""
        return value_R if self.slot_A is None else value_R.index_select(0, self.slot_A)

    def bias_gradient(self, grad_RO: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """Sum over an expert's rows, scaled by ``weight_R`` (float32) if given: (E, O)."""
        if weight_R is not None:
            grad_RO = grad_RO * weight_R.unsqueeze(-1).to(grad_RO.dtype)
        wide_RO = grad_RO.to(torch.promote_types(grad_RO.dtype, torch.float32))
        total_EO: Tensor = torch.segment_reduce(
            wide_RO, "sum", lengths=self.plan.count_E, initial=0.0, unsafe=True
        )  # the checks that unsafe leaves out would read the counts on the host
        return total_EO.to(grad_RO.dtype)

    def bias_inner(self, grad_RO: Tensor, bias_EO: Tensor) -> Tensor:
        """Inner product of each row with its expert's bias: (R,)."""
        inner_R: Tensor = torch.linalg.vecdot(grad_RO, bias_EO.index_select(0, self.plan.expert_index_A))
        return inner_R


class BatchedRows(RowLayout):
    """Rows padded to the fullest expert, R = E x C, for batched GEMMs. A padding row holds any token, at weight 0."""

    def __init__(self, plan: RoutingPlan) -> None:
        super().__init__(plan)
        self.num_experts = plan.count_E.numel()
        self.fullest = int(plan.count_E.max())
        if self.num_experts * self.fullest == plan.token_index_A.numel():
            return  # all experts have C rows: no padding
        start_E = plan.count_E.cumsum(0) - plan.count_E
        place_A = torch.arange(plan.token_index_A.numel(), device=start_E.device) - start_E[plan.expert_index_A]
        self.slot_A = plan.expert_index_A * self.fullest + place_A
        filler = plan.token_index_A[0]
        self.token_R = filler.repeat(self.num_experts * self.fullest)
        self.token_R[self.slot_A] = plan.token_index_A

    def spread(self, value_A: Tensor) -> Tensor:
        if self.slot_A is None:
            return value_A
        return value_A.new_zeros(self.num_experts * self.fullest).index_copy_(0, self.slot_A, value_A)

    def _stack(self, rows: Tensor) -> Tensor:
        return rows.view(self.num_experts, self.fullest, rows.size(-1))

    def linear(self, in_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        return torch.baddbmm(bias_EO.unsqueeze(1), self._stack(in_RI), weight_EIO).flatten(0, 1)

    def input_gradient(self, grad_RO: Tensor, weight_EIO: Tensor) -> Tensor:
        return torch.bmm(self._stack(grad_RO), weight_EIO.transpose(1, 2)).flatten(0, 1)

    def weight_gradient(self, in_RI: Tensor, grad_RO: Tensor) -> Tensor:
        return torch.bmm(self._stack(in_RI).transpose(1, 2), self._stack(grad_RO))

    def bias_gradient(self, grad_RO: Tensor, weight_R: Tensor | None = None) -> Tensor:
        if weight_R is None:
            return self._stack(grad_RO).sum(dim=1)
        weight_E1C = weight_R.to(grad_RO.dtype).view(self.num_experts, 1, self.fullest)
        return torch.bmm(weight_E1C, self._stack(grad_RO)).squeeze(1)

    def bias_inner(self, grad_RO: Tensor, bias_EO: Tensor) -> Tensor:
        return torch.bmm(self._stack(grad_RO), bias_EO.unsqueeze(-1)).view(-1)


class LoopRows(RowLayout):
    """One GEMM per expert that has rows. On a GPU it waits for the counts."""

    def __init__(self, plan: RoutingPlan) -> None:
        super().__init__(plan)
        counts = plan.count_E.tolist()
        self.num_experts = len(counts)
        self.slices: list[tuple[int, slice]] = []
        self.idle = [expert for expert, count in enumerate(counts) if not count]
        start = 0
        for expert, count in enumerate(counts):
            if count:
                self.slices.append((expert, slice(start, start + count)))
                start += count

    def linear(self, in_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        out_RO = in_RI.new_empty(in_RI.size(0), weight_EIO.size(2))
        for expert, rows in self.slices:
            torch.addmm(bias_EO[expert], in_RI[rows], weight_EIO[expert], out=out_RO[rows])
        return out_RO

    def input_gradient(self, grad_RO: Tensor, weight_EIO: Tensor) -> Tensor:
        in_RI = grad_RO.new_empty(grad_RO.size(0), weight_EIO.size(1))
        for expert, rows in self.slices:
            torch.mm(grad_RO[rows], weight_EIO[expert].t(), out=in_RI[rows])
        return in_RI

    def weight_gradient(self, in_RI: Tensor, grad_RO: Tensor) -> Tensor:
        weight_EIO = grad_RO.new_empty(self.num_experts, in_RI.size(1), grad_RO.size(1))
        for expert in self.idle:
            weight_EIO[expert].zero_()
        for expert, rows in self.slices:
            torch.mm(in_RI[rows].t(), grad_RO[rows], out=weight_EIO[expert])
        return weight_EIO


class GroupedRows(RowLayout):
    """Ragged groups through ``torch.nn.functional.grouped_mm``."""

    def __init__(self, plan: RoutingPlan) -> None:
        super().__init__(plan)
        self.end_E = plan.count_E.cumsum(0).int()

    def linear(self, in_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        out_RO = torch.nn.functional.grouped_mm(in_RI, weight_EIO, offs=self.end_E)
        return out_RO.add_(bias_EO.index_select(0, self.plan.expert_index_A))

    def input_gradient(self, grad_RO: Tensor, weight_EIO: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(grad_RO, weight_EIO.transpose(1, 2), offs=self.end_E)

    def weight_gradient(self, in_RI: Tensor, grad_RO: Tensor) -> Tensor:
        # some GPUs write nonzero values for empty groups (pytorch/pytorch issue 172439)
        gradient_EIO = torch.nn.functional.grouped_mm(in_RI.t(), grad_RO, offs=self.end_E)
        return gradient_EIO.masked_fill_((self.plan.count_E == 0).view(-1, 1, 1), 0.0)


def groupable(*widths: int, dtype: torch.dtype) -> bool:
    """True if ``torch.nn.functional.grouped_mm`` takes these widths (rows of whole 16 bytes) and this dtype."""
    known = hasattr(torch.nn.functional, "grouped_mm") and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and all(width * dtype.itemsize % 16 == 0 for width in widths)


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """True if grouped_mm is one kernel on this device; elsewhere torch runs a loop of GEMMs over the groups.

    This is so for compute capability 9.x alone: later ones have open faults with empty groups (pytorch/pytorch issues
    172439, 193633). Source: pytorch/pytorch pull requests 161407 and 162059.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


LAYOUTS: dict[str, type[RowLayout]] = {"bmm": BatchedRows, "grouped": GroupedRows, "loop": LoopRows}
