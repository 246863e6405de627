"""Dispatch and combine: rows gathered by expert and summed by token."""

from __future__ import annotations

import pytest
import torch

from tests.moe.helpers import assert_near, tiny_layer, tokens
from xmoe_fairseq.moe import MoELayer
from xmoe_fairseq.moe.experts import layouts
from xmoe_fairseq.moe.experts.layouts import groupable


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_gather_then_combine_counts_each_tokens_experts(layout: str) -> None:
    layer = tiny_layer(capacity_factor=1.0, min_capacity=1)
    x = tokens(40)
    _, plan = layer(x, torch.arange(40) % 7 == 3)
    rows = layouts.LAYOUTS[layout](plan)
    summed = rows.combine(rows.gather(x), None)
    assert_near(summed, x * plan.experts_per_token_T.unsqueeze(-1), 1e-6)
    weighted = rows.combine(rows.gather(x), plan.weight_A.detach())
    total_T = torch.zeros(40).index_add(0, plan.token_index_A, plan.weight_A.detach())
    assert_near(weighted, x * total_T.unsqueeze(-1), 1e-6)
    weight_R = rows.spread(plan.weight_A.detach())
    assert torch.equal(rows.collect(weight_R), plan.weight_A.detach())
    assert torch.isclose(weight_R.sum(), plan.weight_A.sum())  # rows that only pad weigh nothing


@pytest.mark.parametrize("compute", ["bmm", "grouped", "loop", "masked"])
def test_each_token_comes_back_from_the_experts_it_was_sent_to(compute: str) -> None:
    layer = reveal(tiny_layer("top_k", compute=compute, capacity_factor=None, normalize_weights=True, top_k=1))
    y, plan = layer(tokens(50))
    expert_T = torch.empty(50, dtype=torch.long)
    expert_T[plan.token_index_A] = plan.expert_index_A
    assert_near(y, (expert_T + 1.0).unsqueeze(-1).expand(50, 8), 1e-6)


def reveal(layer: MoELayer) -> MoELayer:
    """Experts, of which expert e returns e + 1 for every input."""
    with torch.no_grad():
        layer.experts.w2.zero_()
        layer.experts.b2.copy_((torch.arange(6) + 1.0).unsqueeze(-1).expand(6, 8))
    return layer


def test_the_grouped_gemm_takes_whole_16_bytes_of_half_and_single_precision() -> None:
    has_kernel = hasattr(torch.nn.functional, "grouped_mm")
    assert groupable(8, 12, dtype=torch.float32) is has_kernel
    assert groupable(8, 16, dtype=torch.bfloat16) is has_kernel
    assert not groupable(8, 12, dtype=torch.bfloat16)
    assert not groupable(8, 6, dtype=torch.float32)
    assert not groupable(8, 8, dtype=torch.float64)


@pytest.mark.parametrize("compute", ["bmm", "grouped", "loop", "masked"])
def test_the_same_call_gives_the_same_bits(compute: str) -> None:
    layer, x = tiny_layer(compute=compute), tokens(60).requires_grad_()
    runs = []
    for _ in range(2):
        y = layer(x)[0]
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
