"""Eq 3 and Algorithm 1: who is served."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.moe.helpers import tiny_layer, tokens
from xmoe_fairseq.moe import MoEConfig, capacity
from xmoe_fairseq.moe.capacity import make_plan, serve_by_priority
from xmoe_fairseq.moe.plan import UNWANTED, Choices


def served(choices: list[list[int]], score_TE: torch.Tensor, limit: int) -> set[tuple[int, int]]:
    rank_TE = torch.full(score_TE.shape, UNWANTED, dtype=torch.int32)
    for token, chosen in enumerate(choices):
        for rank, expert in enumerate(chosen):
            rank_TE[token, expert] = rank
    wanted_E = (rank_TE != UNWANTED).sum(0)
    kept_TE = serve_by_priority(rank_TE, score_TE, wanted_E, limit)
    return {(int(token), int(expert)) for token, expert in kept_TE.nonzero()}


@pytest.mark.parametrize(
    ("gamma", "count", "experts", "least", "expected"),
    [
        (1.0, 64, 8, 1, 8),
        (2.0, 65, 8, 1, 17),  # ceil(16.25)
        (0.01, 100, 8, 1, 1),
        (1.0, 10, 64, 4, 4),  # floor
        (1.0, 3, 64, 4, 3),  # never above the number of tokens
        (100.0, 5, 4, 4, 5),
        (2.0, 0, 4, 4, 0),
    ],
)
def test_capacity_by_hand(gamma: float, count: int, experts: int, least: int, expected: int) -> None:
    config = MoEConfig(embed_dim=2, num_experts=experts, expert_dim=2, capacity_factor=gamma, min_capacity=least)
    assert config.capacity(count, training=True) == expected
    assert config.capacity(count, training=False) is None
    assert reference.capacity_of(gamma, count, experts, least) == expected


def test_a_first_choice_of_little_probability_goes_before_a_second_choice_of_much() -> None:
    score_TE = torch.tensor([[3, 4, 1], [2, 4, 2], [3, 0, 5]]) / 8
    choices = [[1, 0], [1, 0, 2], [2, 0]]
    # expert 0: three second choices, 3/8, 2/8, 3/8: token 0 before token 2 (a tie), token 1 last
    assert served(choices, score_TE, 1) == {(0, 1), (0, 0), (2, 2)}
    assert served(choices, score_TE, 2) == {(0, 1), (1, 1), (0, 0), (2, 0), (2, 2), (1, 2)}
    score_TE = torch.tensor([[1, 2, 0], [3, 4, 0]]) / 8
    assert served([[0], [1, 0]], score_TE, 1) == {(0, 0), (1, 1)}


@pytest.mark.parametrize("levels", [2, 8, 10_000])
@pytest.mark.parametrize("limit", [1, 3, 7, 40])
def test_drops_exactly_those_of_algorithm_1(levels: int, limit: int) -> None:
    generator = torch.Generator().manual_seed(levels + limit)
    score_TE = torch.randint(0, levels, (40, 5), generator=generator) / levels
    order_TE = torch.rand(40, 5, generator=generator).argsort(1).tolist()
    length_T = torch.randint(0, 6, (40,), generator=generator).tolist()
    choices = [order[:length] for order, length in zip(order_TE, length_T, strict=True)]
    assert served(choices, score_TE, limit) == reference.serve(choices, score_TE.tolist(), limit)


def test_near_uniform_gates_are_ordered_by_probability_although_p_minus_i_would_tie() -> None:
    # float32 p - 20 cannot tell these apart
    score_TE = torch.stack([1 / 128 + torch.arange(8) * 2.0**-30, torch.zeros(8)], dim=1)
    assert len(set((score_TE[:, 0] - 20).tolist())) == 1
    rank_TE = torch.tensor([[20, UNWANTED]] * 8, dtype=torch.int32)
    kept_TE = serve_by_priority(rank_TE, score_TE, torch.tensor([8, 0]), 3)
    assert kept_TE[:, 0].tolist() == [False] * 5 + [True] * 3


def test_batches_too_long_for_one_key_serve_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    score_TE = torch.randint(0, 4, (60, 3), generator=generator) / 4
    choices = [[0, 2], [1], [2, 1, 0]] * 20
    short = served(choices, score_TE, 5)
    monkeypatch.setattr(capacity, "UNWANTED", 2**26)  # as if the rank took all bits
    rank_TE = torch.full((60, 3), 2**26)
    for token, chosen in enumerate(choices):
        rank_TE[token, chosen] = torch.arange(len(chosen))
    kept_TE = serve_by_priority(rank_TE, score_TE, (rank_TE != 2**26).sum(0), 5)
    long = {(int(token), int(expert)) for token, expert in kept_TE.nonzero()}
    assert long == short


def test_a_plan_holds_only_what_is_computed_and_counts_what_was_dropped() -> None:
    layer = tiny_layer(capacity_factor=0.5, min_capacity=1)
    _, plan = layer(tokens(60))
    assert plan.capacity == 5
    assert int(plan.count_E.max()) == 5
    assert plan.token_index_A.numel() == int(plan.count_E.sum()) < int(plan.wanted_E.sum())
    assert plan.token_index_A.dtype == plan.count_E.dtype == plan.wanted_E.dtype == torch.int64
    assert plan.weight_A.requires_grad


def test_an_empty_batch_has_an_empty_plan() -> None:
    empty = torch.zeros(0, 3)
    choices = Choices(empty.int(), empty, empty, None, torch.zeros(()))
    plan = make_plan(choices, capacity=0, num_real_tokens=torch.tensor(0))
    assert plan.token_index_A.tolist() == []
    assert plan.count_E.tolist() == plan.wanted_E.tolist() == [0, 0, 0]
    assert plan.balance_loss.item() == 0
