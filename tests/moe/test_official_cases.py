"""The layer against inputs and outputs of the official code (ysngki/XMoE)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.moe.helpers import assert_near
from xmoe_fairseq.moe import MoEConfig, MoELayer

FOLDER = Path(os.environ.get("XMOE_OFFICIAL_CASES", Path(__file__).parents[3] / "shared" / "data" / "official_cases"))
CASES = sorted(path.stem for pattern in ("thr*", "top*") for path in FOLDER.glob(f"{pattern}.pt"))
pytestmark = pytest.mark.skipif(not CASES, reason="no official cases; XMOE_OFFICIAL_CASES names their folder")


def load(name: str) -> tuple[dict[str, Any], MoELayer]:
    case = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    given = case["config"]
    router = {"threshold": "threshold", "topk": "top_k", "base": "base"}[given["moe_type"]]
    layer = MoELayer(
        MoEConfig(
            embed_dim=given["d"],
            num_experts=given["N"],
            expert_dim=given["ff"],
            router=router,
            threshold=given["threshold"],
            top_k=given["k"] if router == "top_k" else None,
            capacity_factor=given["capacity_factor"],
            eval_capacity_factor=given["eval_capacity_factor"],
            min_capacity=given["min_capacity"],
            activation=given["activation"],
        )
    )
    weights = case["weights"]
    layer.load_state_dict(
        {
            "router.weight": weights["wg"],
            "experts.w1": weights["fc1_w"].transpose(1, 2),
            "experts.b1": weights["fc1_b"],
            "experts.w2": weights["fc2_w"].transpose(1, 2),
            "experts.b2": weights["fc2_b"],
        }
    )
    return case, layer.train(given["training"])


@pytest.mark.parametrize("name", CASES)
def test_kept_pairs_weights_and_output(name: str) -> None:
    case, layer = load(name)
    y, plan = layer(case["x"])
    kept = torch.zeros_like(case["combine_weights"])
    kept[plan.token_index_A, plan.expert_index_A] = plan.weight_A.detach()
    assert torch.equal(kept != 0, case["combine_weights"] != 0)
    assert_near(kept, case["combine_weights"])
    assert_near(y, case["y"])
    assert plan.capacity == case["capacity"]
    assert_near(plan.balance_loss, torch.as_tensor(case["l_aux"]))


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("_train")])
def test_gradients(name: str) -> None:
    case, layer = load(name)
    x = case["x"].clone().requires_grad_()
    y, plan = layer(x)
    loss = (y * case["grad_out"]).sum() + case["config"]["aux_coeff"] * plan.balance_loss
    loss.backward()
    grads = case["grads"]
    got = {
        "wg": layer.router.weight.grad,
        "fc1_w": layer.experts.w1.grad.transpose(1, 2),
        "fc1_b": layer.experts.b1.grad,
        "fc2_w": layer.experts.w2.grad.transpose(1, 2),
        "fc2_b": layer.experts.b2.grad,
    }
    assert_near(x.grad, case["grad_x"], 2e-5)
    for weight, gradient in got.items():
        assert_near(gradient, grads[weight], 2e-5)


def test_base_assigns_at_least_as_well_as_the_released_auction() -> None:
    case, layer = load("base_cf1_train")
    _, plan = layer(case["x"])
    assert plan.count_E.tolist() == (case["combine_weights"] != 0).sum(0).tolist() == [8] * 8
    ours = case["logits"][plan.token_index_A, plan.expert_index_A].sum()
    assert ours >= case["logits"][case["combine_weights"] != 0].sum() - 1e-4


def test_base_at_inference_takes_the_best_expert_with_the_same_weight() -> None:
    case, layer = load("base_cf1_eval")
    # at inference the official code drops by token order, this package by priority: compare without drops
    layer = MoELayer(dataclasses.replace(layer.config, eval_capacity_factor=None)).eval()
    layer.load_state_dict(load("base_cf1_eval")[1].state_dict())
    y, plan = layer(case["x"])
    kept = torch.zeros_like(case["combine_weights"])
    kept[plan.token_index_A, plan.expert_index_A] = plan.weight_A.detach()
    served_T = (case["combine_weights"] != 0).any(1)
    assert_near(kept[served_T], case["combine_weights"][served_T])
    assert_near(y[served_T], case["y"][served_T])
