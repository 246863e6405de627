"""Which (token, expert) pairs are kept under a capacity: Eq 3 and the priorities of Algorithm 1.

The i-th choice (i = 0, 1, ...) of a token with score p has priority p - i. Since 0 <= p <= 1, that is the order by
(i, -p); the float32 difference p - i would tie different probabilities. Of pairs with equal i and p the earlier token
is kept first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import host
from .ordering import count_indices, descending_key, flat_nonzero, sort_last_axis
from .plan import Choices, RoutingPlan

# Bits of a non-negative int64.
KEY_BITS = 63


def make_plan(
    choices: Choices, *, capacity: int | None, num_real_tokens: Tensor, row_cost: float | Tensor = 1.0
) -> RoutingPlan:
    """Drop the pairs above ``capacity`` (rows per expert; None keeps all) and list the others by expert, then token."""
    num_tokens, num_experts = choices.weight_TE.shape
    wanted_E = count_indices(choices.expert_TK, num_experts, choices.chosen_TK)
    count_E = wanted_E if capacity is None else wanted_E.clamp(max=capacity)
    if capacity is None or _nothing_dropped(count_E, wanted_E):
        kept_P = pair_numbers(choices.expert_TK, choices.chosen_TK, num_tokens, num_experts)
    else:
        kept_P = serve_by_priority(choices, count_E)
    # a mask over all E x T pairs, and one element for dropped pairs: scanning it is cheaper than sorting the pairs
    mask = torch.zeros(num_experts * num_tokens + 1, dtype=torch.bool, device=kept_P.device)
    pair_A = flat_nonzero(mask.scatter_(0, kept_P, True)[:-1])
    expert_A = torch.div(pair_A, max(num_tokens, 1), rounding_mode="floor")
    token_A = pair_A - expert_A * num_tokens
    return RoutingPlan(
        token_index_A=token_A,
        expert_index_A=expert_A,
        weight_A=choices.weight_TE.reshape(-1).index_select(0, token_A * num_experts + expert_A),
        count_E=count_E,
        wanted_E=wanted_E,
        num_tokens=num_tokens,
        num_real_tokens=num_real_tokens,
        balance=choices.balance,
        entropy=choices.entropy,
        z_loss=choices.z_loss,
        capacity=capacity,
        row_cost=row_cost,
    )


def _nothing_dropped(count_E: Tensor, wanted_E: Tensor) -> bool:
    """True if it is cheaply known that nothing is dropped; on a GPU comparing would wait for the device."""
    return host.on_cpu(count_E) and torch.equal(count_E, wanted_E)


def pair_numbers(expert_TK: Tensor, chosen_TK: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """int64 (T x K,): expert x T + token of each pair; E x T where ``chosen_TK`` is False."""
    token_T1 = torch.arange(num_tokens, device=expert_TK.device).unsqueeze(-1)
    return torch.where(chosen_TK, expert_TK * num_tokens + token_T1, num_experts * num_tokens).view(-1)


def serve_by_priority(choices: Choices, count_E: Tensor) -> Tensor:
    """The ``count_E`` (int64, at most ``wanted_E``) pairs of highest priority of each expert.

    Returns:
        int64: pair numbers in any order; E x T for each pair that is dropped.
    """
    num_tokens, num_experts = choices.weight_TE.shape
    depth = columns_until_full(choices.expert_TK, choices.chosen_TK, count_E)
    expert_TK, chosen_TK = choices.expert_TK[:, :depth], choices.chosen_TK[:, :depth]
    column_TK = torch.arange(depth, device=expert_TK.device).expand_as(expert_TK)
    token_TK = torch.arange(num_tokens, device=expert_TK.device).unsqueeze(-1).expand_as(expert_TK)
    # unchosen pairs go to a dummy expert E of capacity 0
    matrices = (torch.where(chosen_TK, expert_TK, num_experts), column_TK, choices.score_TK[:, :depth], token_TK)
    expert_P, column_P, score_P, token_P = (matrix.reshape(-1) for matrix in matrices)
    if host.on_cpu(expert_TK):  # on a GPU listing the chosen pairs waits for the device; sorting all is cheaper
        chosen_P = flat_nonzero(chosen_TK)
        vectors = (expert_P, column_P, score_P, token_P)
        expert_P, column_P, score_P, token_P = (vector.index_select(0, chosen_P) for vector in vectors)
    expert_P, token_P = _by_priority(expert_P, column_P, score_P, token_P, limits=(num_experts, depth, num_tokens))
    count_with_dummy = torch.cat([count_E, count_E.new_zeros(1)])
    start_E = torch.searchsorted(expert_P, torch.arange(num_experts + 1, device=expert_P.device))
    place_P = torch.arange(expert_P.numel(), device=expert_P.device) - start_E[expert_P]
    return torch.where(place_P < count_with_dummy[expert_P], expert_P * num_tokens + token_P, num_experts * num_tokens)


def columns_until_full(expert_TK: Tensor, chosen_TK: Tensor, count_E: Tensor) -> int:
    """Number of leading choice columns after which every expert is full: no pair of a later column is kept.

    On a GPU the number of all columns, since counting would wait for the device.
    """
    num_tokens, num_columns = expert_TK.shape
    if not host.on_cpu(expert_TK):
        return num_columns
    depth = int(count_E.sum()) // max(num_tokens, 1) + 2
    while depth < num_columns:
        if bool((count_indices(expert_TK[:, :depth], count_E.numel(), chosen_TK[:, :depth]) >= count_E).all()):
            return depth
        depth *= 2
    return num_columns


def _by_priority(
    expert_P: Tensor, column_P: Tensor, score_P: Tensor, token_P: Tensor, *, limits: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Experts and tokens sorted by (expert, column, -score, token); the arguments are sorted by token.

    Args:
        limits: the largest expert; the number of columns; the number of tokens.
    """
    last_expert, num_columns, num_tokens = limits
    key_P = (column_P << 31) | descending_key(score_P)
    token_bits = max(1, (num_tokens - 1).bit_length())
    expert_shift = max(1, (num_columns - 1).bit_length()) + 31
    if last_expert.bit_length() + expert_shift + token_bits <= KEY_BITS:
        key_P = sort_last_axis((((expert_P << expert_shift) | key_P) << token_bits) | token_P)
        return key_P >> (expert_shift + token_bits), key_P & ((1 << token_bits) - 1)
    # the fields need more bits than one key has: two stable sorts keep the earlier token first
    order_P = torch.sort(key_P, stable=True).indices
    order_P = order_P[torch.sort(expert_P[order_P], stable=True).indices]
    return expert_P[order_P], token_P[order_P]
