"""Top-k and Switch."""

from __future__ import annotations

import torch

from tests import reference
from tests.moe.helpers import in_order, tiny_layer, tokens
from xmoe_fairseq.moe import MoEConfig
from xmoe_fairseq.moe.routers.top_k import SwitchRouter, TopKRouter


def test_hand_worked_ties() -> None:
    prob_TE = torch.tensor([[1, 2, 2, 2, 1], [4, 4, 0, 0, 0], [0, 0, 8, 0, 0]]) / 8
    router = TopKRouter(MoEConfig(embed_dim=2, num_experts=5, expert_dim=2, router="top_k", top_k=2))
    assert in_order(router.choose(prob_TE, None, None)) == [[1, 2], [0, 1], [2, 0]]
    switch = SwitchRouter(MoEConfig(embed_dim=2, num_experts=5, expert_dim=2, router="switch"))
    assert in_order(switch.choose(prob_TE, None, None)) == [[1], [0], [2]]


def test_k_experts_are_taken_even_when_probabilities_underflow() -> None:
    layer = tiny_layer("top_k", top_k=4, capacity_factor=None)
    with torch.no_grad():
        layer.router.weight.mul_(1000)
    x = tokens(30)
    y, plan = layer(x)
    assert plan.experts_per_token_T.tolist() == [4] * 30
    (y.square().sum() + plan.balance_loss).backward()
    assert torch.isfinite(layer.router.weight.grad).all()


def test_choices_equal_the_slow_ones_on_many_ties() -> None:
    # 4 levels over 16 experts: most choices are decided by index
    generator = torch.Generator().manual_seed(2)
    prob_TE = torch.randint(0, 4, (200, 16), generator=generator) / 32
    router = TopKRouter(MoEConfig(embed_dim=2, num_experts=16, expert_dim=2, router="top_k", top_k=5))
    expected = [reference.choose_top_k(probs, 5) for probs in prob_TE.tolist()]
    assert in_order(router.choose(prob_TE, None, None)) == expected
