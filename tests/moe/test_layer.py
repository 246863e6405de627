"""MoELayer against the slow reference, and under everything that training and users do with it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.moe.helpers import (
    EXPERTS,
    HIDDEN,
    PATHS,
    ROUTERS,
    WIDTH,
    assert_near,
    assert_same_plan,
    leaves_of,
    slow_forward,
    tiny_layer,
    tokens,
)
from xmoe_fairseq.moe import MoEConfig, MoELayer, record_plans

ALL_PATHS = pytest.mark.parametrize("compute", PATHS)
ALL_ROUTERS = pytest.mark.parametrize("case", ROUTERS)


def inputs(count: int, padded: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    padding = torch.zeros(count, dtype=torch.bool)
    padding[list(padded)] = True
    ids = torch.randint(4, 500, (count,), generator=torch.Generator().manual_seed(3))
    return tokens(count).requires_grad_(), padding, ids


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


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


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


def test_top_1_switch_and_threshold_0_are_one_router() -> None:
    results = []
    for case, settings in (("top_k", {"top_k": 1}), ("switch", {}), ("threshold", {"threshold": 0.0})):
        layer = tiny_layer(case, min_capacity=1, capacity_factor=1.0, **settings)
        y, plan = layer(tokens(40))
        results.append((y, plan.token_index_A, plan.weight_A, plan.count_E, plan.wanted_E, plan.balance_loss))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected)


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
    assert len(plans[""]) == 1  # the recomputation is not a second pass


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
