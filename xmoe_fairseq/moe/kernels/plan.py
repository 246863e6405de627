"""A routing plan whose counts stay on the device until the list of pairs is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..balance import BalanceTerms, SpreadTerms
from ..plan import RoutingPlan
from .tiles import tile_rows


@dataclass(frozen=True)
class Lists:
    """Rows by expert and by token, with static bounds; entries beyond the counts are not initialised.

    Attributes:
        token_R: int32, token of each row; rows are sorted by expert, then by token.
        row_end_E: int32, the end of the expert's rows.
        tile_N3: int32; each tile of ``tile_rows`` rows has its expert, its first row and the end of the expert's rows,
            and where there is no tile both are equal.
        slot_ET: int32, row of each pair, -1 where it is not served.
        row_TK: int32, the rows of each token, by expert. count_T: int32, their number.
        count_E: int64, rows of each expert.
        max_rows: size of every row buffer. tile_rows: rows of a tile.
    """

    token_R: Tensor
    row_end_E: Tensor
    tile_N3: Tensor
    slot_ET: Tensor
    row_TK: Tensor
    count_T: Tensor
    count_E: Tensor
    max_rows: int
    tile_rows: int

    @property
    def num_tiles(self) -> int:
        return self.tile_N3.size(0)

    @property
    def num_experts(self) -> int:
        return self.count_E.numel()

    @property
    def num_tokens(self) -> int:
        return self.count_T.numel()


@dataclass(frozen=True)
class DeviceTerms(BalanceTerms):
    """``BalanceTerms`` with fewer launches: the loss is an inner product with a vector that has no gradient.

    Attributes:
        coefficient_G: load_G * G / num_tokens^2, float32; None after counts were summed over ranks.
    """

    coefficient_G: Tensor | None = None

    def loss(self) -> Tensor:
        coefficient_G = self.coefficient_G
        if coefficient_G is None:
            coefficient_G = self.load_G * (self.load_G.numel() / self.num_tokens.clamp(min=1).square())
        return torch.dot(coefficient_G, self.prob_sum_G)

    def with_counts(self, summed: Tensor) -> DeviceTerms:
        return DeviceTerms(summed[:-1], self.prob_sum_G, summed[-1])


class DevicePlan(RoutingPlan):
    """A ``RoutingPlan`` whose lists of pairs and capacity are made at their first use, which waits for the device.

    Kernels read ``lists`` and ``weight_R`` (float32, with gradient; rows behind the last one are not initialised).
    """

    lists: Lists
    weight_R: Tensor
    _capacity_of: Any

    def __init__(
        self,
        *,
        lists: Lists,
        weight_R: Tensor,
        wanted_E: Tensor,
        num_real_tokens: Tensor,
        balance: BalanceTerms | SpreadTerms | None,
        entropy: Tensor,
        z_loss: Tensor | None,
        row_cost: float | Tensor,
        capacity_of: Any = None,
    ) -> None:
        values = {
            "lists": lists,
            "weight_R": weight_R,
            "count_E": lists.count_E,
            "wanted_E": wanted_E,
            "num_tokens": lists.num_tokens,
            "num_real_tokens": num_real_tokens,
            "balance": balance,
            "entropy": entropy,
            "z_loss": z_loss,
            "row_cost": row_cost,
            "_capacity_of": capacity_of,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def num_rows(self) -> int:
        """Kept pairs A; reading it waits for the device."""
        return int(self.count_E.sum())

    @cached_property
    def token_index_A(self) -> Tensor:
        return self.lists.token_R[: self.num_rows].long()

    @cached_property
    def expert_index_A(self) -> Tensor:
        expert_E = torch.arange(self.count_E.numel(), device=self.count_E.device)
        return expert_E.repeat_interleave(self.count_E, output_size=self.num_rows)

    @cached_property
    def weight_A(self) -> Tensor:
        return self.weight_R[: self.num_rows]

    @cached_property
    def capacity(self) -> int | None:
        of = self._capacity_of
        return None if of is None else of(int(self.num_real_tokens))

    @cached_property
    def balance_loss(self) -> Tensor:
        return self.num_real_tokens.new_zeros((), dtype=torch.float32) if self.balance is None else self.balance.loss()

    @cached_property
    def experts_per_token_T(self) -> Tensor:
        return self.lists.count_T.long()


def lists_of(plan: RoutingPlan, dtype: torch.dtype) -> Lists:
    """Lists for a plan made with torch, such as that of one rank's experts; the host waits once for a size."""
    count_E, num_rows = plan.count_E, plan.token_index_A.numel()
    num_experts, device = count_E.numel(), count_E.device
    height = tile_rows(num_rows, num_experts, dtype)
    num_tiles = min(num_rows, -(-num_rows // height) + num_experts)
    tiles_E = (count_E + height - 1) // height
    end_E, tile_end_E = count_E.cumsum(0), tiles_E.cumsum(0)
    tile = torch.arange(num_tiles, device=device)
    expert = torch.searchsorted(tile_end_E, tile, right=True)
    is_tile = expert < num_experts
    expert = torch.where(is_tile, expert, 0)
    first_row = (end_E - count_E)[expert] + (tile - (tile_end_E - tiles_E)[expert]) * height
    count_T = plan.experts_per_token_T
    most = max(1, int(count_T.max())) if count_T.numel() else 1
    order = torch.argsort(plan.token_index_A, stable=True)
    token = plan.token_index_A[order]
    place = torch.arange(num_rows, device=device) - (count_T.cumsum(0) - count_T)[token]
    row_TK = torch.zeros(plan.num_tokens, most, dtype=torch.int32, device=device)
    row_TK.index_put_((token, place), order.int())
    return Lists(
        token_R=plan.token_index_A.int(),
        row_end_E=end_E.int(),
        tile_N3=torch.stack([expert, first_row, torch.where(is_tile, end_E[expert], first_row)], dim=1).int(),
        slot_ET=count_E.new_empty(0, dtype=torch.int32),
        row_TK=row_TK,
        count_T=count_T.int(),
        count_E=count_E,
        max_rows=num_rows,
        tile_rows=height,
    )
