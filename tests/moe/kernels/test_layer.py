"""The whole layer by kernels (``compute="triton"``) against the slow reference and against torch."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.moe.helpers import ROUTERS, assert_near, assert_same_plan, leaves_of, slow_forward, tiny_layer, tokens
from xmoe_fairseq.moe import MoELayer

pytest.importorskip("triton", reason="triton is not installed")

from tests.moe.kernels.ways import DEVICE, NEAR, assert_same_step, assert_ways_agree, by_torch, padded, run

# NumPy warns where a GPU does not: rows beyond the batch divide 0 by 0, and are not stored
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
COUNT = 24
SLOW = pytest.mark.slow
TIGHT = {"capacity_factor": 0.7, "min_capacity": 1}  # most experts drop pairs


def kernel_layer(case: str = "threshold", **settings: Any) -> MoELayer:
    return tiny_layer(case, compute="triton", **settings)


QUICK = ("threshold", "adamoe", "hash")


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=SLOW) for case in ROUTERS])
def test_with_capacity_decisions_values_and_gradients_are_those_of_the_reference(case: str) -> None:
    layer, x, padding = kernel_layer(case, **TIGHT), tokens(COUNT), padded(COUNT)
    got = assert_ways_agree(layer, x, padding)
    assert int(got.plan.wanted_E.sum()) > int(got.plan.count_E.sum())
    if case == "base":  # its auction is within a tolerance of the reference's optimum; torch's way is its twin
        return
    plain = copy.deepcopy(layer).cpu()
    leaf = x.clone().requires_grad_()
    slow = slow_forward(plain, leaf, padding, torch.arange(COUNT))
    on_cpu = run(layer, x, padding) if DEVICE == "cpu" else None
    if on_cpu is not None:
        assert_same_plan(on_cpu.plan, slow)
    assert_near(got.y.cpu(), slow.y, 3e-5)
    leaves = {"x": leaf, **leaves_of(plain)}
    want = torch.autograd.grad(slow.y.square().sum() + slow.balance, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), want, strict=True):
        if grad is not None:
            assert_near(got.grads[name].cpu(), grad.to(leaf.dtype), 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUTERS)
def test_without_capacity_every_router_does_as_with_torch(case: str) -> None:
    got = assert_ways_agree(kernel_layer(case, capacity_factor=None), tokens(COUNT), padded(COUNT))
    assert got.plan.capacity is None
    assert torch.equal(got.plan.wanted_E, got.plan.count_E)


SHAPES: dict[str, dict[str, Any]] = {
    "no token": {"count": 0},
    "one token": {"count": 1},
    "all padding": {"count": 9, "padding": torch.ones(9, dtype=torch.bool)},
    "one expert": {"num_experts": 1, "expert_dim": 5, "threshold": 0.9},
    "experts of one unit": {"expert_dim": 1, "capacity_factor": None},
    "no width is whole blocks": {"count": 33, "width": 67, "expert_dim": 37, "num_experts": 5},
    "more experts than tokens": {"count": 5, "num_experts": 40, "expert_dim": 3, "threshold": 0.5},
    "every token takes every expert": {"threshold": 1.0, "capacity_factor": None},
}


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=SLOW) if shape == "more experts than tokens" else shape for shape in SHAPES]
)
def test_shapes_at_the_edge(shape: str) -> None:
    settings = {**SHAPES[shape]}
    count, width = settings.pop("count", 24), settings.pop("width", 8)
    padding = settings.pop("padding", padded(count) if count > 1 else None)
    got = assert_ways_agree(kernel_layer(embed_dim=width, **settings), tokens(count, width=width), padding)
    assert got.y.shape == (count, width)
    if shape == "all padding":
        assert got.plan.num_rows == 0
        assert not got.y.any()
        assert not any(grad.any() for grad in got.grads.values())


@pytest.mark.parametrize("case", ["threshold", pytest.param("top_k", marks=SLOW)])
def test_ties_go_to_the_lower_expert_and_the_earlier_token(case: str) -> None:
    layer = kernel_layer(case, num_experts=6, capacity_factor=0.5, min_capacity=1)
    with torch.no_grad():  # experts 0, 2, 4 have equal router rows, and so have 1, 3, 5
        layer.router.weight.copy_(layer.router.weight[:2].repeat(3, 1))
    x = tokens(4).repeat(6, 1)  # each token six times
    got = assert_ways_agree(layer, x)
    assert_same_plan(run(layer, x).plan, slow_forward(layer, x)) if DEVICE == "cpu" else None
    kept = got.plan.token_index_A[got.plan.expert_index_A == 0]
    assert len(kept) == got.plan.capacity


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)])
def test_half_precision_experts_with_a_router_in_single(dtype: torch.dtype) -> None:
    layer = kernel_layer(embed_dim=24, expert_dim=20, **TIGHT)
    layer.experts.to(dtype)
    got = assert_ways_agree(layer, tokens(COUNT, width=24).to(dtype), padded(COUNT))
    assert got.grads["experts.w1"].dtype == got.y.dtype == dtype
    assert got.grads["router.weight"].dtype == torch.float32


def test_autocast_leaves_routing_in_single_and_keeps_no_copy_of_weights() -> None:
    layer = kernel_layer(embed_dim=24, expert_dim=20, **TIGHT)
    x, padding = tokens(COUNT, width=24), padded(COUNT)
    single = run(layer, x, padding)
    kept: list[torch.Tensor] = []
    with (
        torch.autocast(DEVICE, dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
    ):
        got = run(layer, x, padding)
    assert torch.equal(got.plan.expert_index_A, single.plan.expert_index_A)
    assert torch.equal(got.plan.weight_A, single.plan.weight_A)
    assert got.grads["experts.w1"].dtype == torch.float32
    assert_near(got.y, single.y, NEAR[torch.bfloat16])
    owned = {parameter.data_ptr() for parameter in layer.parameters()}
    copies = [t for t in kept if t.numel() == layer.experts.w1.numel() and t.data_ptr() not in owned]
    assert not copies


def test_padding_may_hold_nan_and_a_nan_token_spoils_only_itself() -> None:
    layer, x, padding = kernel_layer(), tokens(COUNT), padded(COUNT)
    clean = run(layer, x, padding)
    x[padding] = float("nan")
    assert_same_step(run(layer, x, padding), clean, 0.0)  # values at padding are not read

    x = tokens(COUNT)
    x[5] = float("nan")
    spoilt = run(layer, x)
    assert spoilt.y[5].isnan().all()
    assert spoilt.plan.balance_loss.isnan()
    assert spoilt.y[torch.arange(COUNT, device=DEVICE) != 5].isfinite().all()
    plan = spoilt.plan  # still lists that fit
    assert int(plan.count_E.sum()) == plan.token_index_A.numel() == len(set(zip_pairs(plan)))


def zip_pairs(plan: Any) -> list[tuple[int, int]]:
    return list(zip(plan.expert_index_A.tolist(), plan.token_index_A.tolist(), strict=True))


def test_dropout_has_one_mask_in_forward_backward_and_recomputation() -> None:
    """One expert that answers its hidden units, all 1 before dropout: y is the mask, and grad b1 the sum of it."""
    width, rate = 32, 0.25
    layer = kernel_layer(
        embed_dim=width, expert_dim=width, num_experts=1, activation="relu", activation_dropout=rate,
        capacity_factor=None,
    ).to(DEVICE)  # fmt: skip
    with torch.no_grad():
        for name, value in {"w1": torch.zeros(width, width), "b1": torch.ones(width), "b2": torch.zeros(width)}.items():
            getattr(layer.experts, name)[0] = value
        layer.experts.w2[0] = torch.eye(width)
    x = tokens(COUNT, width=width).to(DEVICE)

    def answer(checkpointed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=False)[0] if checkpointed else layer(x)[0]
        return y.detach(), torch.autograd.grad(y.sum(), layer.experts.b1)[0]

    y, grad_b1 = answer(checkpointed=False)
    assert torch.isclose(y, torch.tensor(1 / (1 - rate), device=DEVICE)).logical_or(y == 0).all()
    assert 0.7 < (y > 0).float().mean() < 0.8
    assert not torch.equal(y[0], y[1])
    assert_near(grad_b1[0], y.sum(dim=0))
    assert all(torch.equal(one, other) for one, other in zip(answer(checkpointed=True), (y, grad_b1), strict=True))
    torch.manual_seed(4)
    assert not torch.equal(layer(x)[0], y)  # another seed, another mask
    assert torch.equal(layer.eval()(x)[0], torch.ones_like(y))


@pytest.mark.parametrize("case", ["threshold", pytest.param("hash", marks=SLOW)])
def test_deterministic_mode_repeats_every_bit_and_reads_no_unset_memory(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    layer, x, padding = kernel_layer(case, **TIGHT), tokens(COUNT), padded(COUNT)
    free = run(layer, x, padding)
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN, or the largest integer
    try:
        first, second = run(layer, x, padding), run(layer, x, padding)
    finally:
        torch.use_deterministic_algorithms(False)
    for one in (first, second):
        assert_same_step(one, free, 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_more_tokens_than_one_block() -> None:
    assert_ways_agree(kernel_layer("top_k", num_experts=4, **TIGHT), tokens(260), padded(260))


def test_inference_keeps_nothing_and_a_hook_on_the_router_is_called() -> None:
    layer, x = kernel_layer(**TIGHT).to(DEVICE).eval(), tokens(COUNT).to(DEVICE)
    with torch.no_grad():
        y, plan = layer(x)
        assert plan.capacity is None
        assert_near(y, by_torch(layer)(x)[0], NEAR[torch.float32])
        seen: list[Any] = []
        layer.router.register_forward_hook(lambda module, inputs, output: seen.append(output))
        hooked, _ = layer(x)
    assert len(seen) == 1
    assert_near(hooked, y, NEAR[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_settings(seed: int) -> None:
    draw = random.Random(seed)
    case = draw.choice([name for name in ROUTERS if name not in ("hash", "base")])
    settings: dict[str, Any] = {
        "embed_dim": draw.randint(1, 40),
        "expert_dim": draw.randint(1, 40),
        "num_experts": draw.choice([4, 5, 8, 17]),
        "activation": draw.choice(["gelu", "relu", "silu", "gelu_fast"]),
        "capacity_factor": draw.choice([None, 0.5, 1.0, 2.0]),
        "min_capacity": draw.choice([1, 2, 4]),
        "z_loss_weight": draw.choice([0.0, 0.1]),
        "shared_expert_dim": draw.choice([0, 6]),
    }
    count = draw.randint(1, 50)
    layer = kernel_layer(case, **settings)
    x = tokens(count, seed=seed, width=settings["embed_dim"])
    assert_ways_agree(layer, x, draw.choice([None, padded(count, draw.randint(2, 9))]))
