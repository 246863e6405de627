"""Who is served and who is dropped: Eq 3 and the priorities of Algorithm 1.

The i-th choice (i = 0, 1, ...) of a token with score p has priority p - i. Since 0 <= p <= 1, that is the order by
(rank, -p), which unlike the float32 difference never ties two different probabilities. Equal ranks and scores:
the earlier token is served first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ordering import descending_key, flat_nonzero, kth_smallest
from .plan import UNWANTED, Choices, RoutingPlan


def make_plan(
    choices: Choices, *, capacity: int | None, num_real_tokens: Tensor, row_cost: float | Tensor = 1.0
) -> RoutingPlan:
    """Drop what exceeds ``capacity`` (rows per expert; None keeps all) and list what is left by expert, then token."""
    wanted_TE = choices.rank_TE != UNWANTED
    wanted_E = wanted_TE.sum(dim=0)
    kept_TE = wanted_TE
    if capacity is not None:
        kept_TE = serve_by_priority(choices.rank_TE, choices.score_TE, wanted_E, capacity)
    num_tokens, num_experts = kept_TE.shape
    flat_A = flat_nonzero(kept_TE.t().contiguous())
    expert_A = torch.div(flat_A, max(num_tokens, 1), rounding_mode="floor")
    token_A = flat_A - expert_A * num_tokens
    return RoutingPlan(
        token_index_A=token_A,
        expert_index_A=expert_A,
        weight_A=choices.weight_TE.reshape(-1).index_select(0, token_A * num_experts + expert_A),
        count_E=kept_TE.sum(dim=0),
        wanted_E=wanted_E,
        num_tokens=num_tokens,
        num_real_tokens=num_real_tokens,
        balance=choices.balance,
        entropy=choices.entropy,
        z_loss=choices.z_loss,
        capacity=capacity,
        row_cost=row_cost,
    )


def serve_by_priority(rank_TE: Tensor, score_TE: Tensor, wanted_E: Tensor, capacity: int) -> Tensor:
    """Mark the at most ``capacity`` pairs each expert serves.

    Args:
        rank_TE: int32, ``UNWANTED`` where not wanted.
        score_TE: float32 >= 0.
        wanted_E: int64, wanted pairs per expert.
        capacity: rows per expert, 0 only when there are no real tokens.
    Returns:
        bool (T, E).
    """
    kept_TE = rank_TE != UNWANTED
    full_F = flat_nonzero(wanted_E > capacity)
    if full_F.numel() == 0:
        return kept_TE
    rank_FT, score_FT = (matrix.index_select(1, full_F).t().contiguous() for matrix in (rank_TE, score_TE))
    kept_TE[:, full_F] = _first_in_line(rank_FT, score_FT, capacity).t()
    return kept_TE


def _first_in_line(rank_FT: Tensor, score_FT: Tensor, capacity: int) -> Tensor:
    """bool (F, T): the ``capacity`` first pairs of each row by (rank, -score, token); each row wants more than that."""
    num_tokens = rank_FT.size(-1)
    token_bits = max(1, (num_tokens - 1).bit_length())
    key_FT = (rank_FT.long() << 31) | descending_key(score_FT)
    if UNWANTED.bit_length() + 31 + token_bits <= 63:
        key_FT = (key_FT << token_bits) | torch.arange(num_tokens, device=key_FT.device)
        return key_FT <= kth_smallest(key_FT, capacity).unsqueeze(-1)
    # too many tokens for one unique key: a stable sort keeps the earlier token first
    line_FT = torch.sort(key_FT, dim=-1, stable=True).indices[:, :capacity]
    return torch.zeros_like(key_FT, dtype=torch.bool).scatter_(1, line_FT, True)
