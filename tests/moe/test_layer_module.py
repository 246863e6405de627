"""MoELayer as a torch module: its state, copies, activation checkpointing, hooks, recorded plans."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.moe.helpers import (
    EXPERTS,
    HIDDEN,
    ROUTERS,
    WIDTH,
    assert_near,
    inputs,
    slow_forward,
    tiny_layer,
    tokens,
)
from xmoe_fairseq.moe import MoEConfig, MoELayer, record_plans

ALL_ROUTERS = pytest.mark.parametrize("case", ROUTERS)


@pytest.mark.parametrize(
    ("case", "router_state"),
    [
        ("threshold", {"router.weight": (EXPERTS, WIDTH)}),
        ("top_k", {"router.weight": (EXPERTS, WIDTH)}),
        ("switch", {"router.weight": (EXPERTS, WIDTH)}),
        ("base", {"router.weight": (EXPERTS, WIDTH)}),
        ("adamoe", {"router.weight": (EXPERTS + 3, WIDTH)}),
        ("hash", {"router.seed": ()}),
    ],
)
def test_names_and_shapes_of_the_state(case: str, router_state: dict[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(value.shape) for name, value in tiny_layer(case).state_dict().items()}
    assert shapes == {
        **router_state,
        "experts.w1": (EXPERTS, WIDTH, HIDDEN),
        "experts.b1": (EXPERTS, HIDDEN),
        "experts.w2": (EXPERTS, HIDDEN, WIDTH),
        "experts.b2": (EXPERTS, WIDTH),
    }


def test_each_expert_has_its_own_random_start() -> None:
    layer = MoELayer(MoEConfig(embed_dim=16, num_experts=5, expert_dim=24))
    for parameter in layer.experts.parameters():
        flat = parameter.detach().flatten(1)
        assert len({tuple(row.tolist()) for row in flat}) == 5
        correlation = torch.corrcoef(flat).fill_diagonal_(0)
        assert float(correlation.abs().max()) < 0.9
    bound = {"w1": 16**-0.5, "b1": 16**-0.5, "w2": 24**-0.5, "b2": 24**-0.5}  # as nn.Linear
    for name, limit in bound.items():
        value = getattr(layer.experts, name)
        assert 0.5 * limit < float(value.detach().abs().max()) <= limit


@ALL_ROUTERS
def test_a_copy_and_a_pickle_compute_the_same(case: str) -> None:
    layer = tiny_layer(case).eval()
    x, _, ids = inputs(20)
    layer(x, None, ids)[0].sum().backward()
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for other in (copy.deepcopy(layer), torch.load(stored, weights_only=False)):
        assert torch.equal(other(x, None, ids)[0], layer(x, None, ids)[0])
        assert all(a is not b for a, b in zip(other.parameters(), layer.parameters(), strict=True))


def test_a_threshold_state_runs_with_top_k_and_back() -> None:
    threshold, top_k = tiny_layer("threshold"), tiny_layer("top_k", seed=9)
    top_k.load_state_dict(threshold.state_dict())
    threshold.load_state_dict(top_k.state_dict())
    x = tokens(11)
    assert_near(top_k.eval()(x)[0], slow_forward(top_k, x).y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_every_gradient(reentrant: bool) -> None:
    def loss_of(layer: MoELayer, x: Tensor, wrapped: bool) -> Tensor:
        # a reentrant checkpoint keeps the gradient of tensors only, so the loss leaves it as one
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            y, plan = layer(x)
            return y, plan.balance_loss

        y, balance = checkpoint(run, x, use_reentrant=reentrant) if wrapped else run(x)
        return y.square().sum() + balance

    layer = tiny_layer(input_jitter=0.1, activation_dropout=0.2)
    x = tokens(30).requires_grad_()
    found = []
    for wrapped in (False, True):
        torch.manual_seed(4)
        layer.zero_grad(set_to_none=True)
        x.grad = None
        loss_of(layer, x, wrapped).backward()
        found.append([leaf.grad.clone() for leaf in (x, *layer.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_checkpointed_plan_keeps_the_gradient_of_its_balance_loss() -> None:
    layer = tiny_layer()
    x = tokens(30).requires_grad_()
    with record_plans(layer) as plans:
        y, plan = checkpoint(layer, x, use_reentrant=False)
    (y.sum() * 0 + plan.balance_loss).backward()
    got = layer.router.weight.grad.clone()
    layer.zero_grad()
    layer(x)[1].balance_loss.backward()
    assert torch.equal(got, layer.router.weight.grad)
    assert got.abs().max() > 0
    assert len(plans[""]) == 1  # the recomputation is not recorded as a second pass


def test_plans_are_recorded_once_per_call_and_hooks_are_taken_off() -> None:
    model = torch.nn.ModuleDict({"a": tiny_layer(), "b": tiny_layer("hash"), "c": torch.nn.Linear(WIDTH, WIDTH)})
    x, ids = tokens(6), torch.arange(6)
    with record_plans(model) as plans:
        model["a"](x)
        model["a"](x[:2])
    assert {name: [plan.num_tokens for plan in layer] for name, layer in plans.items()} == {"a": [6, 2], "b": []}
    model["a"](x)
    model["b"](x, None, ids)
    assert [len(layer) for layer in plans.values()] == [2, 0]
    with pytest.raises(RuntimeError, match="stop"), record_plans(model):
        raise RuntimeError("stop")
    assert not model["a"]._forward_hooks


@ALL_ROUTERS
def test_backward_hooks_on_every_module_as_fairseqs_search_for_a_nan_hangs_them(case: str) -> None:
    layer = tiny_layer(case, shared_expert_dim=4)
    seen = []
    for module in layer.modules():
        module.register_backward_hook(lambda module, *_: seen.append(type(module).__name__))
    x, padding, ids = inputs(9)
    y, plan = layer(x, padding, ids)
    (y.sum() + plan.balance_loss).backward()
    assert {"MoELayer", "Experts", "SharedExpert"} <= set(seen)
