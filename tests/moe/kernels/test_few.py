"""Few tokens without capacity and gradient, as in decoding: one launch routes them as the other five would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe.helpers import ROUTERS, assert_near, tiny_layer, tokens
from xmoe_fairseq.moe import MoELayer, RoutingPlan

pytest.importorskip("triton", reason="triton is not installed")

from tests.moe.kernels.ways import DEVICE, NEAR, assert_lists, assert_same_decisions, by_torch, padded
from xmoe_fairseq.moe.kernels.launch import record

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
ONE_LAUNCH = ["route_few", "expert_up", "rows_times_experts", "combine_rows"]
CASES = [case for case in ROUTERS if case not in ("hash", "base")]  # these choose with torch


def translate(layer: MoELayer, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, RoutingPlan, list[str]]:
    """Output, plan and the names of the kernels launched."""
    with torch.no_grad(), record() as recorded:
        y, plan = layer(x.to(DEVICE), None if padding is None else padding.to(DEVICE))
    return y, plan, [launch.kernel for launch in recorded.launches]


def assert_few_as_by_torch(layer: MoELayer, x: Tensor, padding: Tensor | None = None) -> RoutingPlan:
    layer = layer.to(DEVICE).eval()
    y, plan, launched = translate(layer, x, padding)
    want_y, want, _ = translate(by_torch(layer), x, padding)
    assert launched == (ONE_LAUNCH if len(x) else ONE_LAUNCH[:1])
    assert_same_decisions(plan, want)
    assert_lists(plan.lists, want.expert_index_A.cpu(), want.token_index_A.cpu())
    assert_near(y.float(), want_y.float(), NEAR[x.dtype])
    for name in ("weight_A", "balance_loss", "entropy", "z_loss"):
        mine, theirs = getattr(plan, name), getattr(want, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert_near(mine, theirs, 3e-5)
    if want.balance is not None:
        assert plan.balance.load_G.tolist() == want.balance.load_G.tolist()
        assert_near(plan.balance.prob_sum_G, want.balance.prob_sum_G, 3e-5)
    return plan


@pytest.mark.parametrize(
    "case", [case if case == "threshold" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_router_decides_as_with_torch(case: str) -> None:
    assert_few_as_by_torch(tiny_layer(case, compute="triton"), tokens(19), padded(19))
    assert_few_as_by_torch(tiny_layer(case, compute="triton", z_loss_weight=0.1), tokens(1))


def test_equal_tokens_make_several_tiles_of_one_expert() -> None:
    plan = assert_few_as_by_torch(tiny_layer("top_k", compute="triton", num_experts=17), tokens(1).repeat(30, 1))
    assert plan.count_E.max() == 30 > plan.lists.tile_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = tiny_layer(compute="triton", embed_dim=24, expert_dim=20)
    layer.experts.to(dtype)
    assert_few_as_by_torch(layer, tokens(20, width=24).to(dtype))


def test_ties_no_token_all_padding_and_a_nan() -> None:
    layer = tiny_layer("top_k", compute="triton", num_experts=6)
    with torch.no_grad():  # experts 0, 2, 4 have equal gates, and so have 1, 3, 5
        layer.router.weight.copy_(layer.router.weight[:2].repeat(3, 1))
    assert_few_as_by_torch(layer, tokens(7))
    assert_few_as_by_torch(layer, tokens(0))
    assert assert_few_as_by_torch(layer, tokens(4), torch.ones(4, dtype=torch.bool)).num_rows == 0
    spoilt = tokens(5)
    spoilt[2] = float("nan")
    clean, _, _ = translate(layer, tokens(5))
    y, plan, _ = translate(layer, spoilt)
    assert y[2].isnan().all()
    assert plan.experts_per_token_T.tolist() == [3] * 5
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    y, _, _ = translate(layer, spoilt, torch.arange(5).eq(2))
    assert not y[2].any()


@pytest.mark.parametrize("why", ["training", "gradient", "capacity", "many tokens"])
def test_otherwise_several_launches_route(why: str) -> None:
    settings: dict[str, Any] = {"eval_capacity_factor": 1.0} if why == "capacity" else {}
    layer = tiny_layer(compute="triton", **settings).to(DEVICE).train(why == "training")
    with torch.set_grad_enabled(why == "gradient"), record() as recorded:
        layer(tokens(33 if why == "many tokens" else 5).to(DEVICE))
    names = [launch.kernel for launch in recorded.launches]
    assert names == ["gate_logits", "route_forward", "select", "place", "by_token", *ONE_LAUNCH[1:]]
