"""The stacked experts: the hand-written backward, and the rules that choose a path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.moe.helpers import PATHS, assert_near, tiny_layer, tokens
from xmoe_fairseq.moe import MoELayer
from xmoe_fairseq.moe.activations import ACTIVATIONS
from xmoe_fairseq.moe.experts import stacked
from xmoe_fairseq.moe.experts.stacked import choose_path


def plan_of(layer: MoELayer, count: int) -> Any:
    with torch.no_grad():
        return layer(tokens(count, width=layer.config.embed_dim))[1]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_and_their_derivatives(activation: str) -> None:
    function = ACTIVATIONS[activation]
    pre = torch.randn(50, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(50, dtype=torch.float64)
    want = torch.autograd.grad(function.forward(pre), pre, grad)[0]
    assert torch.allclose(function.backward_(grad.clone(), pre.detach()), want)
    overwritten = pre.detach().clone()
    function.forward_into(overwritten, overwritten)
    assert torch.equal(overwritten, function.forward(pre.detach()))
    named = {
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "relu": lambda x: x.clamp(min=0),
        "silu": lambda x: x / (1 + (-x).exp()),
        "swish": lambda x: x / (1 + (-x).exp()),
    }
    tanh = lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))  # noqa: E731
    assert torch.allclose(function.forward(pre), named.get(activation, tanh)(pre), atol=1e-9)


@pytest.mark.parametrize("compute", ["bmm", "loop"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_backward_equals_finite_differences(compute: str, dropout: float, activation: str) -> None:
    layer = tiny_layer(
        compute=compute, activation=activation, activation_dropout=dropout, embed_dim=3, expert_dim=4, num_experts=3
    ).double()
    plan = plan_of(layer, 7)
    weight_A = plan.weight_A.double().requires_grad_()
    names = ("w1", "b1", "w2", "b2")
    leaves = [tokens(7, width=3).double().requires_grad_(), weight_A]
    leaves += [getattr(layer.experts, name).detach().clone().requires_grad_() for name in names]

    def run(x: torch.Tensor, weight_A: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # the same hidden units drop every time
        layout = stacked.LAYOUTS[compute](plan)
        return stacked._ExpertSum.apply(x, weight_A, *weights, layout, activation, dropout, True)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("compute", PATHS)
def test_dropout_keeps_the_mean_and_is_off_at_inference(compute: str) -> None:
    layer = tiny_layer(compute=compute, activation_dropout=0.5, capacity_factor=None)
    x = tokens(6)
    exact = layer.eval()(x)[0].detach()
    assert torch.equal(layer(x)[0], exact)
    layer.train()
    with torch.no_grad():
        mean = layer(x.repeat(2000, 1))[0].view(2000, 6, -1).mean(0)
    assert_near(mean, exact, 0.05)
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("compute", PATHS)
def test_two_passes_before_one_backward_keep_their_own_tensors(compute: str) -> None:
    layer = tiny_layer(compute=compute)
    first, second = tokens(20).requires_grad_(), tokens(33, seed=4).requires_grad_()
    alone = [torch.autograd.grad(layer(x)[0].square().sum(), [x, layer.experts.w1]) for x in (first, second)]
    outputs = [layer(x)[0].square().sum() for x in (first, second)]
    for x, output, want in zip((second, first), outputs[::-1], alone[::-1], strict=True):
        got = torch.autograd.grad(output, [x, layer.experts.w1], retain_graph=True)
        again = torch.autograd.grad(output, [x, layer.experts.w1])
        for a, b, c in zip(got, again, want, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, c)


@pytest.mark.parametrize("compute", PATHS)
def test_expanded_and_strided_gradients(compute: str) -> None:
    layer = tiny_layer(compute=compute)
    x = tokens(10).requires_grad_()
    y, _ = layer(x)
    expanded = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]  # a stride-0 gradient
    dense = torch.autograd.grad(y, x, torch.ones(10, 8), retain_graph=True)[0]
    strided = torch.autograd.grad(y, x, torch.ones(8, 10).t(), retain_graph=True)[0]
    assert_near(expanded, dense, 1e-6)
    assert_near(strided, dense, 1e-6)


@pytest.mark.parametrize("compute", PATHS)
def test_frozen_experts_and_a_frozen_router(compute: str) -> None:
    layer = tiny_layer(compute=compute)
    x = tokens(10)
    layer.experts.requires_grad_(False)
    layer(x)[0].sum().backward()
    assert layer.experts.w1.grad is None
    only_router = layer.router.weight.grad.clone()
    layer.experts.requires_grad_(True)
    layer.zero_grad()
    layer(x)[0].sum().backward()
    assert torch.equal(layer.router.weight.grad, only_router)
    with_router = layer.experts.w2.grad.clone()
    layer.zero_grad()
    layer.router.requires_grad_(False)
    layer(x)[0].sum().backward()
    assert torch.equal(layer.experts.w2.grad, with_router)
    with torch.no_grad():
        assert not layer(x)[0].requires_grad


def test_auto_chooses_by_shape_and_computes_the_same() -> None:
    wide = {"embed_dim": 64, "expert_dim": 1024, "num_experts": 4, "capacity_factor": None}
    cases = [
        ("loop", 2, {"top_k": 1}),  # two experts to read, not four
        ("bmm", 400, {"top_k": 2, "capacity_factor": 1.0}),
        ("masked", 60, {"top_k": 4}),
    ]
    for path, count, settings in cases:
        layer = tiny_layer("top_k", **{**wide, **settings})
        plan = plan_of(layer, count)
        assert choose_path(layer.config, plan, torch.float32) == path
    uneven = tiny_layer("switch", **wide)
    with torch.no_grad():
        uneven.router.weight[0] += 3 * uneven.router.weight.abs().max()
    x = tokens(400, width=64) + 0.5
    plan = uneven(x)[1]
    assert choose_path(uneven.config, plan, torch.float32) == "loop"
    # two GEMMs of small matrices cost more than one batched GEMM of four
    small = tiny_layer("top_k", **{**wide, "embed_dim": 16, "top_k": 1})
    assert choose_path(small.config, plan_of(small, 2), torch.float32) == "bmm"


def test_more_threads_favour_the_batched_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny_layer("top_k", embed_dim=512, expert_dim=1024, num_experts=4, top_k=1, capacity_factor=None)
    plan = plan_of(layer, 60)
    chosen = {}
    for threads in (1, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        chosen[threads] = choose_path(layer.config, plan, torch.float32)
    assert chosen == {1: "loop", 8: "bmm"}
