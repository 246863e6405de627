"""The decision of a router (``Choices``), and the pairs that are computed of it (``RoutingPlan``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from .balance import BalanceTerms, SpreadTerms
from .ordering import count_indices


class Choices(NamedTuple):
    """The experts that each token wants, before capacity: its first choice in column 0, its second in column 1, ...

    It is a tuple because fairseq's search for a NaN puts a backward hook on every module, and torch's hook requires
    that a module's output consists of tuples, dicts and tensors.

    Attributes:
        expert_TK: int64 in [0, E), any value where ``chosen_TK`` is False; the chosen experts of a token differ.
        chosen_TK: bool, False where the token wants fewer experts, or is padding.
        score_TK: float32 >= 0, no gradient: within one column an expert keeps higher scores first.
        weight_TE: float32 with gradient: the factor on the output of expert e for token t.
        balance: terms of the balance loss; None for a router without one.
        entropy: float32 scalar, nats, mean over real tokens of the router's entropy; 0 where it has no probabilities.
        z_loss: float32 scalar with gradient, already weighted; None when off.
    """

    expert_TK: Tensor
    chosen_TK: Tensor
    score_TK: Tensor
    weight_TE: Tensor
    balance: BalanceTerms | SpreadTerms | None
    entropy: Tensor
    z_loss: Tensor | None = None


@dataclass(frozen=True)
class RoutingPlan:
    """The (token, expert) pairs that are computed, sorted by expert, then by token.

    Attributes:
        token_index_A: int64, row of the flattened batch, in [0, num_tokens).
        expert_index_A: int64, ascending, in [0, E).
        weight_A: float32, multiplies the expert's output; carries the router's gradient.
        count_E: int64, kept rows per expert; sums to A.
        wanted_E: int64, pairs before capacity; wanted - count were dropped.
        num_tokens: T, padding included.
        num_real_tokens: int64 scalar tensor, padding excluded: the denominator of every rate.
        balance: terms of the balance loss; None where the router has none.
        entropy: float32 scalar, nats: mean entropy of the router over real tokens.
        z_loss: float32 scalar with gradient, weighted; None when off.
        capacity: rows one expert could take; None when nothing is ever dropped.
        row_cost: FLOPs of one kept row, relative to one token through the dense FFN that the layer stands for.
    """

    token_index_A: Tensor
    expert_index_A: Tensor
    weight_A: Tensor
    count_E: Tensor
    wanted_E: Tensor
    num_tokens: int
    num_real_tokens: Tensor
    balance: BalanceTerms | SpreadTerms | None
    entropy: Tensor
    z_loss: Tensor | None
    capacity: int | None
    row_cost: float | Tensor = 1.0

    @cached_property
    def balance_loss(self) -> Tensor:
        """Scalar float32 with gradient: the router's balance loss, unweighted; 0 where it has none."""
        if self.balance is None:
            return self.weight_A.new_zeros(())
        return self.balance.loss()

    @cached_property
    def experts_per_token_T(self) -> Tensor:
        """int64 (T,): experts that computed each token."""
        return count_indices(self.token_index_A, self.num_tokens)
