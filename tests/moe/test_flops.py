"""Counted FLOPs equal the formula."""

from __future__ import annotations

import pytest
import torch

from tests.moe.helpers import EXPERTS, HIDDEN, WIDTH, tiny_layer, tokens
from xmoe_fairseq.moe import MoELayer
from xmoe_fairseq.moe.flops import counted_flops

PER_ROW = 4 * WIDTH * HIDDEN  # two linear maps, 2 per multiply-add


def counted(layer: MoELayer, x: torch.Tensor) -> int:
    return counted_flops(lambda: layer(x))


@pytest.mark.parametrize("case", ["threshold", "top_k", "switch", "adamoe", "base"])
@pytest.mark.parametrize("compute", ["grouped", "loop"])
def test_ragged_paths_count_kept_rows_and_the_router(case: str, compute: str) -> None:
    layer = tiny_layer(case, compute=compute, capacity_factor=1.0)
    x = tokens(60)
    plan = layer(x)[1]
    gates = layer.router.weight.size(0)
    assert layer.config.flops_per_row == PER_ROW
    assert counted(layer, x) == plan.token_index_A.numel() * PER_ROW + 60 * 2 * WIDTH * gates


def test_hash_has_no_router_cost() -> None:
    layer = tiny_layer("hash", compute="grouped", capacity_factor=None)
    assert counted_flops(lambda: layer(tokens(50).detach(), None, torch.arange(50))) == 50 * PER_ROW


def test_bmm_counts_its_padding_and_masked_every_pair() -> None:
    x, router = tokens(60), 60 * 2 * WIDTH * EXPERTS
    layer = tiny_layer("top_k", compute="bmm", capacity_factor=None)
    fullest = int(layer(x)[1].count_E.max())
    assert counted(layer, x) == fullest * EXPERTS * PER_ROW + router
    masked = tiny_layer("top_k", compute="masked", capacity_factor=None)
    biases = 60 * 2 * EXPERTS * WIDTH  # weights times output biases, one matrix product here
    assert counted(masked, x) == 60 * EXPERTS * PER_ROW + biases + router


@pytest.mark.parametrize("compute", ["grouped", "loop"])
def test_backward_counts_twice_the_forward(compute: str) -> None:
    layer = tiny_layer("top_k", top_k=2, compute=compute, capacity_factor=None)
    x = tokens(50).requires_grad_()
    forward, both = counted(layer, x.detach()), counted_flops(lambda: layer(x)[0].sum().backward())
    assert both == 3 * forward


def test_dense_as_xmoe_costs_one_dense_ffn_of_all_experts() -> None:
    layer = tiny_layer(threshold=1.0, capacity_factor=None, compute="grouped")
    dense = torch.nn.Sequential(torch.nn.Linear(WIDTH, EXPERTS * HIDDEN), torch.nn.Linear(EXPERTS * HIDDEN, WIDTH))
    x = tokens(20)
    assert counted(layer, x) - 20 * 2 * WIDTH * EXPERTS == counted_flops(lambda: dense(x))
