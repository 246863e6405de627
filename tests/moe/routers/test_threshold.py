"""Eq 5 of XMoE: the fewest top experts that reach the threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.moe.helpers import assert_near, in_order, tiny_layer, tokens
from xmoe_fairseq.moe import MoEConfig
from xmoe_fairseq.moe.routers.threshold import ThresholdRouter


def chosen_experts(prob_TE: Tensor, threshold: float, **settings: Any) -> list[list[int]]:
    experts = prob_TE.size(1)
    config = MoEConfig(embed_dim=2, num_experts=experts, expert_dim=2, threshold=threshold, **settings)
    return in_order(ThresholdRouter(config).choose(prob_TE, None, None))


@pytest.mark.parametrize(
    ("threshold", "chosen"),
    [
        (0.0, [2]),
        (0.25, [2]),
        (0.5, [2]),  # reached exactly: no further expert
        (0.5000001, [2, 0]),  # 0 and 3 tie at 2/8: the lower index first
        (0.75, [2, 0]),
        (0.76, [2, 0, 3]),
        (1.0, [2, 0, 3, 1]),  # reached after three, but 1 means every expert
    ],
)
def test_hand_worked_ties(threshold: float, chosen: list[int]) -> None:
    assert chosen_experts(torch.tensor([[2, 0, 4, 2]]) / 8, threshold) == [chosen]


def test_max_experts_stops_before_the_threshold_does() -> None:
    prob_TE = torch.tensor([[4, 2, 1, 1], [8, 0, 0, 0]]) / 8
    assert chosen_experts(prob_TE, 0.9, max_experts=2) == [[0, 1], [0]]


def test_equal_probabilities_are_taken_from_the_lowest_index() -> None:
    assert chosen_experts(torch.full((1, 8), 1 / 8), 0.375) == [[0, 1, 2]]


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1000.0])
def test_threshold_1_uses_every_expert_even_when_probabilities_underflow(scale: float) -> None:
    layer = tiny_layer(threshold=1.0, num_experts=64, capacity_factor=None, compute="loop")
    with torch.no_grad():
        layer.router.weight.mul_(scale)
    _, plan = layer(tokens(20))
    assert plan.wanted_E.tolist() == [20] * 64
    assert plan.count_E.tolist() == [20] * 64


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 0.999, 1 - 2**-30, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_choices_equal_the_exact_sums(threshold: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    prob_TE = (scale * torch.randn(40, 64, generator=generator)).softmax(-1)
    expected = [reference.choose_by_threshold(probs, threshold) for probs in prob_TE.tolist()]
    assert chosen_experts(prob_TE, threshold) == expected


def test_normalised_weights_of_a_token_sum_to_1() -> None:
    layer = tiny_layer("threshold normalised", capacity_factor=None)
    _, plan = layer(tokens(30))
    total_T = torch.zeros(30).index_add(0, plan.token_index_A, plan.weight_A.detach())
    assert_near(total_T, torch.ones(30), 1e-6)
