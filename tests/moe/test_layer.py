"""MoELayer against the slow reference: what it computes, what padding and noise do, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe.helpers import (
    EXPERTS,
    PATHS,
    ROUTERS,
    WIDTH,
    assert_near,
    assert_same_plan,
    gradients,
    inputs,
    leaves_of,
    slow_forward,
    tiny_layer,
    tokens,
)
from xmoe_fairseq.moe import MoELayer

ALL_PATHS = pytest.mark.parametrize("compute", PATHS)
ALL_ROUTERS = pytest.mark.parametrize("case", ROUTERS)


def assert_equals_slow_layer(layer: MoELayer, x: Tensor, padding: Tensor, ids: Tensor) -> None:
    """Output, plan, balance loss and every gradient, balance loss included."""
    y, plan = layer(x, padding, ids)
    slow = slow_forward(layer, x, padding, ids)
    assert_same_plan(plan, slow)
    assert_near(y, slow.y)
    leaves = {"x": x, **leaves_of(layer)}
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    got = gradients((y * cotangent).sum() + 3 * plan.balance_loss, leaves)
    want = gradients((slow.y * cotangent).sum() + 3 * slow.balance, leaves)
    for name in leaves:
        assert_near(got[name], want[name])


@ALL_ROUTERS
@ALL_PATHS
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_training_equals_the_slow_layer(case: str, compute: str, capacity_factor: float | None) -> None:
    layer = tiny_layer(case, compute=compute, capacity_factor=capacity_factor, min_capacity=1)
    assert_equals_slow_layer(layer, *inputs(29, padded=(0, 7, 8, 28)))


@ALL_ROUTERS
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_few_tokens_equal_the_slow_layer(case: str, count: int) -> None:
    for compute in (*PATHS, "auto"):
        assert_equals_slow_layer(tiny_layer(case, compute=compute), *inputs(count))


@ALL_ROUTERS
def test_inference_equals_the_slow_layer_with_and_without_capacity(case: str) -> None:
    for gamma in (None, 0.7):
        layer = tiny_layer(case, eval_capacity_factor=gamma, min_capacity=1).eval()
        assert_equals_slow_layer(layer, *inputs(31, padded=(3,)))


def test_relu_and_uneven_widths_equal_the_slow_layer() -> None:
    # widths that torch's grouped GEMM refuses
    for compute in ("bmm", "loop", "masked", "auto"):
        assert_equals_slow_layer(tiny_layer(compute=compute, activation="relu", expert_dim=7), *inputs(23))


def test_what_the_grouped_gemm_cannot_do_is_refused_clearly() -> None:
    for layer, x in (
        (tiny_layer(compute="grouped", expert_dim=7), tokens(9)),
        (tiny_layer(compute="grouped"), tokens(9).double()),
    ):
        with pytest.raises(ValueError, match=r"moe_compute grouped cannot multiply .* choose auto"):
            layer(x)


@ALL_ROUTERS
@ALL_PATHS
def test_only_padding_gives_zeros_and_no_gradient(case: str, compute: str) -> None:
    layer = tiny_layer(case, compute=compute)
    x, padding, ids = inputs(5, padded=(0, 1, 2, 3, 4))
    y, plan = layer(x, padding, ids)
    assert torch.equal(y, torch.zeros_like(y))
    assert plan.token_index_A.numel() == 0
    assert int(plan.num_real_tokens) == 0
    assert plan.balance_loss.item() == 0
    (y.sum() + plan.balance_loss).backward()
    for leaf in (x, *layer.parameters()):
        assert leaf.grad is None or torch.equal(leaf.grad, torch.zeros_like(leaf))


@ALL_ROUTERS
@ALL_PATHS
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_values_at_padding_do_not_matter(case: str, compute: str, garbage: float) -> None:
    layer = tiny_layer(
        case, compute=compute, shared_expert_dim=4, z_loss_weight=0.0 if case in ("hash", "base") else 0.1
    )
    x, padding, ids = inputs(13, padded=(0, 6, 12))
    results = []
    for filler in (0.0, garbage):
        filled = x.detach().clone()
        filled[padding] = filler
        filled.requires_grad_()
        y, plan = layer(filled, padding, ids)
        extra = 0 if plan.z_loss is None else plan.z_loss
        found = gradients(y.square().sum() + plan.balance_loss + extra, {"x": filled, **leaves_of(layer)})
        assert torch.equal(y[padding], torch.zeros_like(y[padding]))
        assert torch.equal(found["x"][padding], torch.zeros_like(y[padding]))
        results.append([y, plan.weight_A, plan.entropy, plan.balance_loss, *found.values()])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@ALL_PATHS
def test_idle_experts_get_exactly_zero_gradient(compute: str) -> None:
    layer = tiny_layer("top_k", top_k=1, compute=compute)
    y, plan = layer(tokens(3))
    y.square().sum().backward()
    idle = plan.count_E == 0
    assert 0 < int(idle.sum()) < EXPERTS
    for parameter in layer.experts.parameters():
        assert torch.equal(parameter.grad[idle], torch.zeros_like(parameter.grad[idle]))
        assert (parameter.grad[~idle] != 0).any()


@ALL_PATHS
def test_the_shape_of_the_input_does_not_matter(compute: str) -> None:
    layer = tiny_layer(compute=compute).eval()
    x = tokens(24)
    flat, _ = layer(x)
    batch, _ = layer(x.view(4, 6, WIDTH).transpose(0, 1))  # not contiguous
    assert_near(batch.transpose(0, 1).reshape(24, WIDTH), flat, 1e-6)
    alone, _ = layer(x[0])
    assert alone.shape == (WIDTH,)
    assert_near(alone, flat[0], 1e-6)


@pytest.mark.parametrize("case", [name for name in ROUTERS if name != "base"])
def test_without_capacity_a_token_does_not_depend_on_its_neighbours(case: str) -> None:
    layer = tiny_layer(case).eval()
    x, _, ids = inputs(40)
    together, plan = layer(x, None, ids)
    for token in (0, 17, 39):
        alone, alone_plan = layer(x[token : token + 1], None, ids[token : token + 1])
        assert_near(alone[0], together[token], 1e-6)
        chosen = plan.expert_index_A[plan.token_index_A == token]
        assert alone_plan.expert_index_A.tolist() == chosen.tolist()


def test_top_1_switch_and_threshold_0_are_one_router() -> None:
    results = []
    for case, settings in (("top_k", {"top_k": 1}), ("switch", {}), ("threshold", {"threshold": 0.0})):
        layer = tiny_layer(case, min_capacity=1, capacity_factor=1.0, **settings)
        y, plan = layer(tokens(40))
        results.append((y, plan.token_index_A, plan.weight_A, plan.count_E, plan.wanted_E, plan.balance_loss))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected)


def test_shared_expert_is_added_for_real_tokens() -> None:
    layer = tiny_layer(shared_expert_dim=5)
    x, padding, _ = inputs(9, padded=(4,))
    y, _ = layer(x, padding)
    shared = layer.shared
    layer.shared = None
    routed, _ = layer(x, padding)
    expected = shared.fc2(torch.nn.functional.gelu(shared.fc1(x)))
    expected[4] = 0
    assert_near(y, routed + expected)


def test_jitter_and_noise_act_in_training_only() -> None:
    x = tokens(64)
    for case, settings in (
        ("threshold", {"input_jitter": 0.5}),
        ("top_k", {"router_noise": "gumbel"}),
        ("switch", {"router_noise": "gaussian"}),
        ("adamoe", {"router_noise": "gumbel"}),
    ):
        noisy, clean = tiny_layer(case, **settings), tiny_layer(case)
        assert torch.equal(noisy.eval()(x)[0], clean.eval()(x)[0])
        noisy.train()
        assert not torch.equal(noisy(x)[0], noisy(x)[0])


def test_noise_changes_the_choice_but_not_the_weight() -> None:
    layer = tiny_layer("top_k", router_noise="gumbel", capacity_factor=None)
    x = tokens(200)
    prob = (x @ layer.router.weight.t()).softmax(-1)
    _, plan = layer(x)
    assert_near(plan.weight_A, prob[plan.token_index_A, plan.expert_index_A])
    best = prob.topk(3).indices
    chosen = torch.zeros_like(prob, dtype=torch.bool)
    chosen[plan.token_index_A, plan.expert_index_A] = True
    assert not chosen.gather(1, best).all()
    assert (chosen.sum(1) == 3).all()


def test_gumbel_noise_draws_experts_with_their_probability() -> None:
    layer = tiny_layer("top_k", top_k=1, router_noise="gumbel", capacity_factor=None)
    x = tokens(1).expand(20_000, WIDTH)
    torch.manual_seed(0)
    _, plan = layer(x)
    prob = (x[0] @ layer.router.weight.t()).softmax(-1)
    assert float((plan.count_E / 20_000 - prob).abs().max()) < 0.015  # 4 standard deviations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3, 9)}, r"x must be floating point \(..., 8\), got torch.float32 \(3, 9\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.long)}, "x must be floating point"),
        ({"x": torch.zeros(2, 3, 8), "padding": torch.zeros(3, 2, dtype=torch.bool)}, r"padding has shape \(3, 2\)"),
        ({"x": torch.zeros(4, 8), "token_ids": torch.zeros(3, dtype=torch.long)}, r"token_ids has shape \(3,\)"),
    ],
)
def test_wrong_inputs_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_layer()(**arguments)
