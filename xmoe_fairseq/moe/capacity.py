"""Who is served and who is dropped: Eq 3 and the priorities of Algorithm 1.

The i-th choice (i = 0, 1, ...) of a token with score p has priority p - i. Since 0 <= p <= 1, that is the order by
(rank, -p), which unlike the float32 difference never ties two different probabilities. Equal ranks and scores:
the earlier token is served first.

Axis letters: T tokens; E experts; K ranks; P pairs (token, expert) in line for their expert, served or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import host
from .ordering import count_indices, descending_key, flat_nonzero, sort_last
from .plan import Choices, RoutingPlan

# Bits of an int64 that sort as one number >= 0.
KEY_BITS = 63


def make_plan(
    choices: Choices, *, capacity: int | None, num_real_tokens: Tensor, row_cost: float | Tensor = 1.0
) -> RoutingPlan:
    """Drop what exceeds ``capacity`` (rows per expert; None keeps all) and list what is left by expert, then token."""
    num_tokens, num_experts = choices.weight_TE.shape
    wanted_E = count_indices(choices.expert_TK, num_experts, choices.chosen_TK)
    count_E = wanted_E if capacity is None else wanted_E.clamp(max=capacity)
    if capacity is None or _known_equal(count_E, wanted_E):
        kept_P = pair_numbers(choices.expert_TK, choices.chosen_TK, num_tokens, num_experts)
    else:
        kept_P = serve_by_priority(choices, count_E)
    # one byte for every pair there could be, and one for what is not kept: cheaper to scan than pairs are to sort
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


def _known_equal(count_E: Tensor, wanted_E: Tensor) -> bool:
    """Whether nobody is dropped; on CUDA asking would be a host synchronisation, and sorting for nothing is cheaper."""
    return host.on_cpu(count_E) and torch.equal(count_E, wanted_E)


def pair_numbers(expert_TK: Tensor, chosen_TK: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """int64 (T x K,): expert x T + token of each pair; E x T where nothing is chosen."""
    token_T1 = torch.arange(num_tokens, device=expert_TK.device).unsqueeze(-1)
    return torch.where(chosen_TK, expert_TK * num_tokens + token_T1, num_experts * num_tokens).view(-1)


def serve_by_priority(choices: Choices, count_E: Tensor) -> Tensor:
    """The first ``count_E`` (int64, at most what is wanted) pairs in each expert's line.

    Returns:
        int64, pair numbers in any order, E x T among them for what is not served.
    """
    num_tokens, num_experts = choices.weight_TE.shape
    depth = ranks_that_fill(choices.expert_TK, choices.chosen_TK, count_E)
    expert_TR, chosen_TR = choices.expert_TK[:, :depth], choices.chosen_TK[:, :depth]
    rank_TR = torch.arange(depth, device=expert_TR.device).expand_as(expert_TR)
    token_TR = torch.arange(num_tokens, device=expert_TR.device).unsqueeze(-1).expand_as(expert_TR)
    # one who is not chosen waits for an expert that does not exist, where nobody is served
    matrices = (torch.where(chosen_TR, expert_TR, num_experts), rank_TR, choices.score_TK[:, :depth], token_TR)
    expert_P, rank_P, score_P, token_P = (matrix.reshape(-1) for matrix in matrices)
    if host.on_cpu(expert_TR):  # elsewhere a host synchronisation, and sorting them is cheaper
        chosen_P = flat_nonzero(chosen_TR)
        columns = (expert_P, rank_P, score_P, token_P)
        expert_P, rank_P, score_P, token_P = (column.index_select(0, chosen_P) for column in columns)
    expert_P, token_P = _in_line(expert_P, rank_P, score_P, token_P, limits=(num_experts, depth, num_tokens))
    served_E = torch.cat([count_E, count_E.new_zeros(1)])
    start_E = torch.searchsorted(expert_P, torch.arange(num_experts + 1, device=expert_P.device))
    place_P = torch.arange(expert_P.numel(), device=expert_P.device) - start_E[expert_P]
    return torch.where(place_P < served_E[expert_P], expert_P * num_tokens + token_P, num_experts * num_tokens)


def ranks_that_fill(expert_TK: Tensor, chosen_TK: Tensor, count_E: Tensor) -> int:
    """How many leading ranks hold everyone who is served: later ones find every expert full.

    On CUDA all ranks, since looking would be a host synchronisation.
    """
    num_tokens, num_ranks = expert_TK.shape
    if not host.on_cpu(expert_TK):
        return num_ranks
    depth = int(count_E.sum()) // max(num_tokens, 1) + 2
    while depth < num_ranks:
        if bool((count_indices(expert_TK[:, :depth], count_E.numel(), chosen_TK[:, :depth]) >= count_E).all()):
            return depth
        depth *= 2
    return num_ranks


def _in_line(
    expert_P: Tensor, rank_P: Tensor, score_P: Tensor, token_P: Tensor, *, limits: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Experts and tokens ordered by (expert, rank, -score, token); they come ordered by token.

    Args:
        limits: the largest expert; one above the largest rank, and above the largest token.
    """
    last_expert, num_ranks, num_tokens = limits
    key_P = (rank_P << 31) | descending_key(score_P)
    token_bits = max(1, (num_tokens - 1).bit_length())
    expert_shift = max(1, (num_ranks - 1).bit_length()) + 31
    if last_expert.bit_length() + expert_shift + token_bits <= KEY_BITS:
        key_P = sort_last((((expert_P << expert_shift) | key_P) << token_bits) | token_P)
        return key_P >> (expert_shift + token_bits), key_P & ((1 << token_bits) - 1)
    # too much for one unique key: two stable sorts keep the earlier token first
    order_P = torch.sort(key_P, stable=True).indices
    order_P = order_P[torch.sort(expert_P[order_P], stable=True).indices]
    return expert_P[order_P], token_P[order_P]
