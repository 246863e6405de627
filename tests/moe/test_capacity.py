"""Eq 3 and Algorithm 1: which pairs are kept."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.moe.helpers import tiny_layer, tokens
from xmoe_fairseq.moe import MoEConfig, capacity
from xmoe_fairseq.moe.capacity import columns_until_full, make_plan
from xmoe_fairseq.moe.plan import Choices


def line_up(choices: list[list[int]], score_TE: torch.Tensor) -> Choices:
    num_ranks = max(map(len, choices), default=1) or 1
    expert_TK = torch.tensor([chosen + [0] * (num_ranks - len(chosen)) for chosen in choices])
    chosen_TK = torch.tensor([[rank < len(chosen) for rank in range(num_ranks)] for chosen in choices])
    return Choices(expert_TK, chosen_TK, score_TE.gather(1, expert_TK), score_TE, None, torch.zeros(()))


def served(choices: list[list[int]], score_TE: torch.Tensor, limit: int) -> set[tuple[int, int]]:
    plan = make_plan(line_up(choices, score_TE), capacity=limit, num_real_tokens=torch.tensor(len(choices)))
    assert plan.count_E.tolist() == torch.bincount(plan.expert_index_A, minlength=score_TE.size(1)).tolist()
    return set(zip(plan.token_index_A.tolist(), plan.expert_index_A.tolist(), strict=True))


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
        (1.1, 400, 8, 1, 55),  # 55 exactly; in float64 the product is above it
        (1 / 3, 300, 10, 1, 10),
    ],
)
def test_capacity_by_hand(gamma: float, count: int, experts: int, least: int, expected: int) -> None:
    config = MoEConfig(embed_dim=2, num_experts=experts, expert_dim=2, capacity_factor=gamma, min_capacity=least)
    assert config.capacity(count, training=True) == expected
    assert config.capacity(count, training=False) is None
    assert reference.capacity_of(gamma, count, experts, least) == expected


@pytest.mark.parametrize("gamma", [1.1, 2.0, 1 / 3, 0.7, 123.456789, 1e-9])
def test_the_fraction_of_gamma_gives_the_same_capacity_in_int64_on_a_device(gamma: float) -> None:
    config = MoEConfig(embed_dim=2, num_experts=60, expert_dim=2, capacity_factor=gamma, min_capacity=1)
    numerator, denominator = config.capacity_fraction(training=True)
    count_N = torch.tensor([1, 7, 400, 4_096, 65_536, 8_388_607])
    share_N = (numerator * count_N + denominator * 60 - 1) // (denominator * 60)
    expected = [config.capacity(count, training=True) for count in count_N.tolist()]
    assert share_N.clamp(min=1).minimum(count_N).tolist() == expected
    assert config.capacity_fraction(training=False) is None


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
    # all experts before the last are full of others' choices; float32 p - 20 cannot tell these apart
    score_TE = torch.cat([torch.zeros(8, 20), 1 / 128 + torch.arange(8).unsqueeze(1) * 2.0**-30], dim=1)
    assert len(set((score_TE[:, 20] - 20).tolist())) == 1
    pairs = served([list(range(21))] * 8, score_TE, 3)
    assert {token for token, expert in pairs if expert == 20} == {5, 6, 7}


def test_columns_are_counted_until_every_expert_is_full() -> None:
    # every token chooses expert 5 last, and no token chooses expert 4
    generator = torch.Generator().manual_seed(3)
    choices = [[*torch.randperm(4, generator=generator).tolist(), 5] for _ in range(50)]
    score_TE = torch.rand(50, 6, generator=generator)
    assert served(choices, score_TE, 2) == reference.serve(choices, score_TE.tolist(), 2)
    chosen = line_up(choices, score_TE)
    assert columns_until_full(chosen.expert_TK, chosen.chosen_TK, torch.tensor([2, 2, 2, 2, 0, 2])) == 5
    assert columns_until_full(chosen.expert_TK, chosen.chosen_TK, torch.tensor([2, 2, 2, 2, 0, 0])) == 2


def test_batches_too_long_for_one_key_keep_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    score_TE = torch.randint(0, 4, (60, 3), generator=generator) / 4
    choices = [[0, 2], [1], [2, 1, 0]] * 20
    short = served(choices, score_TE, 5)
    monkeypatch.setattr(capacity, "KEY_BITS", 40)
    assert served(choices, score_TE, 5) == short == reference.serve(choices, score_TE.tolist(), 5)


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
    choices = Choices(empty.long(), empty.bool(), empty, empty, None, torch.zeros(()))
    plan = make_plan(choices, capacity=0, num_real_tokens=torch.tensor(0))
    assert plan.token_index_A.tolist() == []
    assert plan.count_E.tolist() == plan.wanted_E.tolist() == [0, 0, 0]
    assert plan.balance_loss.item() == 0
