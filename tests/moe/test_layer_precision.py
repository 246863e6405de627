"""MoELayer in the precisions of training: autocast, half, float64; torch.compile and deterministic mode."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.moe.helpers import (
    PATHS,
    ROUTERS,
    assert_near,
    assert_same_plan,
    gradients,
    inputs,
    leaves_of,
    slow_forward,
    tiny_layer,
    tokens,
)

ALL_PATHS = pytest.mark.parametrize("compute", PATHS)
ALL_ROUTERS = pytest.mark.parametrize("case", ROUTERS)


@pytest.mark.parametrize("case", ["threshold", "top_k", "switch", "adamoe", "base"])
def test_probabilities_stay_float32_under_autocast_and_in_half_precision(case: str) -> None:
    layer = tiny_layer(case, compute="loop")
    x = tokens(50)
    _, exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plan = layer(x)
    assert y.dtype == torch.float32
    assert plan.weight_A.dtype == torch.float32
    assert torch.equal(plan.token_index_A, exact.token_index_A)
    assert torch.equal(plan.weight_A, exact.weight_A)
    assert torch.equal(plan.balance_loss, exact.balance_loss)
    half = x.bfloat16()
    _, plan = layer(half)
    _, exact = layer(half.float())
    assert torch.equal(plan.weight_A, exact.weight_A)


@ALL_ROUTERS
@ALL_PATHS
@pytest.mark.parametrize("mode", ["autocast", "bfloat16 input", "bfloat16 layer", "float16 layer"])
def test_low_precision_is_near_float32(case: str, compute: str, mode: str) -> None:
    layer = tiny_layer(case, compute=compute, embed_dim=16, expert_dim=16)
    x = tokens(30, width=16).bfloat16().float()
    ids = torch.arange(30)
    low = copy.deepcopy(layer)
    dtype = torch.float16 if "float16" in mode.split() else torch.bfloat16
    if "layer" in mode:
        low = low.to(dtype)
        layer.load_state_dict(
            {name: value.float() for name, value in low.state_dict().items() if name != "router.seed"}, strict=False
        )
    y, plan = layer(x, None, ids)
    y.square().sum().backward()
    given = x if mode == "autocast" else x.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        low_y, low_plan = low(given, None, ids)
        low_y.float().square().sum().backward()
    assert low_y.dtype == given.dtype
    assert torch.equal(low_plan.token_index_A, plan.token_index_A)
    assert_near(low_y.float(), y, 3e-2)
    for name, parameter in low.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert_near(parameter.grad.float(), dict(layer.named_parameters())[name].grad, 5e-2)


@pytest.mark.parametrize("compute", ["bmm", "loop", "masked", "auto"])
def test_float64_input_is_computed_in_float64(compute: str) -> None:
    layer = tiny_layer(compute=compute).double()
    x = tokens(300).double().requires_grad_()  # enough for auto to leave the loop
    y, plan = layer(x)
    slow = slow_forward(layer, x)
    assert y.dtype == torch.float64
    assert_same_plan(plan, slow)
    assert_near(y, slow.y)  # the routing weights stay float32
    y.sum().backward()
    assert x.grad.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("case", ["threshold", "base"])
def test_torch_compile_computes_the_same(case: str) -> None:
    layer = tiny_layer(case, min_capacity=1)
    compiled = torch.compile(layer, backend="aot_eager")
    for count in (12, 20):
        x, padding, ids = inputs(count, padded=(1,))
        results = []
        for function in (layer, compiled):
            y, plan = function(x, padding, ids)
            found = gradients(y.square().sum() + plan.balance_loss, {"x": x, **leaves_of(layer)})
            results.append([y, plan.token_index_A, plan.weight_A, *found.values()])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


@ALL_PATHS
@ALL_ROUTERS
def test_deterministic_mode_takes_every_way_and_repeats_it_to_the_last_bit(case: str, compute: str) -> None:
    def step() -> list[torch.Tensor | None]:
        layer = tiny_layer(case, compute=compute)
        x = tokens(50).requires_grad_()
        y, plan = layer(x, token_ids=torch.arange(50))
        (y.square().sum() + plan.balance_loss).backward()
        return [y.detach(), x.grad, *(weight.grad for weight in layer.parameters())]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(), step()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
