"""Eq 5 of XMoE: the fewest top experts that reach the threshold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.moe.helpers import assert_near, tiny_layer, tokens
from xmoe_fairseq.moe import MoEConfig
from xmoe_fairseq.moe.plan import UNWANTED
from xmoe_fairseq.moe.routers.threshold import ThresholdRouter


def ranks(prob_TE: Tensor, threshold: float) -> Tensor:
    experts = prob_TE.size(1)
    router = ThresholdRouter(MoEConfig(embed_dim=2, num_experts=experts, expert_dim=2, threshold=threshold))
    return router.choose(prob_TE, None, None).rank_TE


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
    rank_E = ranks(torch.tensor([[2, 0, 4, 2]]) / 8, threshold)[0]
    assert [int((rank_E == rank).nonzero()) for rank in range(len(chosen))] == chosen
    assert int((rank_E != UNWANTED).sum()) == len(chosen)


def test_max_experts_stops_before_the_threshold_does() -> None:
    config = MoEConfig(embed_dim=2, num_experts=4, expert_dim=2, threshold=0.9, max_experts=2)
    prob_TE = torch.tensor([[4, 2, 1, 1], [8, 0, 0, 0]]) / 8
    rank_TE = ThresholdRouter(config).choose(prob_TE, None, None).rank_TE
    assert rank_TE.tolist() == [[0, 1, UNWANTED, UNWANTED], [0, UNWANTED, UNWANTED, UNWANTED]]


def test_equal_probabilities_are_taken_from_the_lowest_index() -> None:
    rank_E = ranks(torch.full((1, 8), 1 / 8), 0.375)[0]
    assert rank_E.tolist() == [0, 1, 2, *[UNWANTED] * 5]


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
    rank_TE = ranks(prob_TE, threshold)
    for token, probs in enumerate(prob_TE.tolist()):
        chosen = reference.choose_by_threshold(probs, threshold)
        rank_E = [UNWANTED] * 64
        for rank, expert in enumerate(chosen):
            rank_E[expert] = rank
        assert rank_TE[token].tolist() == rank_E


def test_normalised_weights_of_a_token_sum_to_1() -> None:
    layer = tiny_layer("threshold normalised", capacity_factor=None)
    _, plan = layer(tokens(30))
    total_T = torch.zeros(30).index_add(0, plan.token_index_A, plan.weight_A.detach())
    assert_near(total_T, torch.ones(30), 1e-6)
