"""Each part of the Triton way against its twin in torch: routing, serving, experts; and the lists between them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from tests.moe.helpers import assert_near
from tests.moe.kernels.ways import DEVICE, NEAR, assert_lists, assert_same_decisions
from xmoe_fairseq.moe import MoEConfig, RoutingPlan
from xmoe_fairseq.moe.activations import ACTIVATIONS
from xmoe_fairseq.moe.capacity import make_plan
from xmoe_fairseq.moe.kernels import experts as kernel_experts
from xmoe_fairseq.moe.kernels import routing
from xmoe_fairseq.moe.kernels.activation import activate, activate_with_slope
from xmoe_fairseq.moe.kernels.plan import DevicePlan, lists_of
from xmoe_fairseq.moe.ordering import sort_descending
from xmoe_fairseq.moe.plan import Choices
from xmoe_fairseq.moe.routers.router import KernelRule
from xmoe_fairseq.moe.routers.threshold import count_to_reach

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def route(logits_TG: Tensor, rule: KernelRule) -> DevicePlan:
    """The plan of a router whose gate is the identity: tokens are logits, exactly."""
    num_gates = logits_TG.size(1)
    config = MoEConfig(embed_dim=num_gates, num_experts=num_gates, expert_dim=4, capacity_factor=None)
    gate = torch.eye(num_gates, device=DEVICE)
    return routing.route(logits_TG.to(DEVICE), gate, None, rule, config, training=True)[1]


@pytest.mark.parametrize("num_gates", [1, 6, pytest.param(33, marks=pytest.mark.slow), 512])
def test_route_orders_and_counts_as_torch_does(num_gates: int) -> None:
    """Logits in quarters tie often; the mass at which a token stops is no sum of such probabilities."""
    if num_gates == 512 and DEVICE == "cpu":
        pytest.skip("a minute in the interpreter; runs on a GPU")
    generator = torch.Generator().manual_seed(num_gates)
    logits = torch.randint(-8, 9, (7, num_gates), generator=generator) / 4
    prob, expert = sort_descending(logits.softmax(-1))
    for threshold in (0.0, 0.4303, 0.9017, 1.0) if num_gates < 10 or DEVICE == "cuda" else (0.9017,):
        plan = route(logits, KernelRule(threshold=threshold, most=num_gates, num_gates=num_gates))
        count = count_to_reach(prob, threshold)
        chosen = [set(row[:most].tolist()) for row, most in zip(expert, count.tolist(), strict=True)]
        pairs = sorted((e, t) for t, experts in enumerate(chosen) for e in experts)
        assert list(zip(plan.expert_index_A.tolist(), plan.token_index_A.tolist(), strict=True)) == pairs
    most = min(3, num_gates)
    plan = route(logits, KernelRule(threshold=None, most=most, num_gates=num_gates))
    assert plan.wanted_E.tolist() == torch.bincount(expert[:, :most].flatten(), minlength=num_gates).tolist()
    assert_near(plan.entropy.cpu(), -(prob * prob.log()).sum(-1).mean(), 3e-5)


def test_the_mass_is_summed_exactly() -> None:
    """Eight equal gates: half of the mass is four of them to the last bit, and the least bit more is five."""
    for threshold, most in ((0.5, 4), (0.5 + 2**-53, 5), (0.125, 1), (1.0, 8)):
        plan = route(torch.zeros(3, 8), KernelRule(threshold=threshold, most=8, num_gates=8))
        assert plan.experts_per_token_T.tolist() == [most] * 3
        assert plan.wanted_E.tolist() == [3] * most + [0] * (8 - most)


def test_sums_for_the_losses_and_their_gradients() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    real = torch.arange(9) % 4 != 1
    gate = torch.eye(5, device=DEVICE).requires_grad_()
    config = MoEConfig(5, 5, 4, threshold=0.7, capacity_factor=None, z_loss_weight=0.5)
    rule = KernelRule(threshold=0.7, most=5, num_gates=5)
    _, plan = routing.route(logits.to(DEVICE), gate, ~real.to(DEVICE), rule, config, training=True)
    assert plan.balance is not None
    assert plan.z_loss is not None

    weight = torch.eye(5).requires_grad_()
    scores = logits[real] @ weight.t()
    prob = scores.softmax(-1)
    z_loss = 0.5 * scores.logsumexp(-1).square().mean()
    assert plan.balance.load_G.tolist() == torch.bincount(prob.argmax(-1), minlength=5).tolist()
    assert_near(plan.balance.prob_sum_G.cpu(), prob.sum(0))
    want_balance = 5 * (plan.balance.load_G.cpu() / 7 * prob.sum(0) / 7).sum()  # 7 of the 9 tokens are real
    assert_near(plan.balance.loss().cpu(), want_balance)
    assert_near(plan.balance.with_counts(plan.balance.counts()).loss().cpu(), want_balance)
    assert_near(plan.z_loss.cpu(), z_loss)
    pull = torch.arange(5.0)
    want = torch.autograd.grad((prob.sum(0) * pull).sum() + z_loss, weight)[0]
    got = torch.autograd.grad((plan.balance.prob_sum_G * pull.to(DEVICE)).sum() + plan.z_loss, gate)[0]
    assert_near(got.cpu(), want, 3e-5)


def random_choices(draw: random.Random, num_tokens: int, num_experts: int, most: int) -> tuple[Choices, Tensor]:
    """Choices with scores in quarters, so that most compare equal, and which tokens are real."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    shape = (num_tokens, most)
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :most]
    real_T = torch.rand(num_tokens, generator=generator) < 0.9
    chosen_TK = (torch.rand(shape, generator=generator) < 0.8) & real_T.unsqueeze(-1)
    score_TK = torch.randint(0, 5, shape, generator=generator) / 4
    weight_TE = torch.rand(num_tokens, num_experts, generator=generator)
    zero = torch.zeros((), device=DEVICE)
    tensors = (tensor.to(DEVICE) for tensor in (expert_TK, chosen_TK, score_TK, weight_TE))
    return Choices(*tensors, balance=None, entropy=zero), real_T.to(DEVICE)


@pytest.mark.parametrize("seed", range(4))
def test_select_and_place_serve_whom_torch_serves(seed: int) -> None:
    draw = random.Random(seed)
    assert_served_as_by_torch(draw, draw.randint(1, 30), draw.choice([1, 3, 9]))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(3))
def test_equal_scores_in_several_blocks_of_tokens(seed: int) -> None:
    """About a fifth of an expert's pairs tie with its last served one, in each of four blocks."""
    assert_served_as_by_torch(random.Random(seed), 400, 3)


def assert_served_as_by_torch(draw: random.Random, num_tokens: int, num_experts: int) -> None:
    choices, real_T = random_choices(draw, num_tokens, num_experts, draw.randint(1, num_experts))
    config = MoEConfig(
        8, num_experts, 4, capacity_factor=draw.choice([None, 0.3, 1.0]), min_capacity=draw.choice([1, 3])
    )
    leaf = choices.weight_TE.requires_grad_()
    capacity = config.capacity(int(real_T.sum()), training=True)
    want = make_plan(choices, capacity=capacity, num_real_tokens=real_T.sum(), row_cost=config.row_cost)
    got = routing.plan_choices(choices, ~real_T, config, True, torch.float32)
    assert_same_decisions(got, want)
    assert torch.equal(got.weight_A, want.weight_A)
    assert_lists(got.lists, want.expert_index_A.cpu(), want.token_index_A.cpu())
    pull = torch.arange(1.0, got.num_rows + 1, device=DEVICE)
    for mine, theirs in zip(*(torch.autograd.grad((p.weight_A * pull).sum(), leaf) for p in (got, want)), strict=True):
        assert torch.equal(mine, theirs)


def plan_of(count_E: list[int], num_tokens: int, seed: int = 0) -> RoutingPlan:
    """A plan made with torch, without any router: ``count_E`` tokens for each expert, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randperm(num_tokens, generator=generator)[:count].sort().values for count in count_E]
    count = torch.tensor(count_E, device=DEVICE)
    rows = sum(count_E)
    return RoutingPlan(
        token_index_A=torch.cat(tokens).to(DEVICE),
        expert_index_A=torch.arange(len(count_E), device=DEVICE).repeat_interleave(count),
        weight_A=torch.rand(rows, generator=generator).to(DEVICE).requires_grad_(),
        count_E=count,
        wanted_E=count,
        num_tokens=num_tokens,
        num_real_tokens=torch.tensor(num_tokens, device=DEVICE),
        balance=None,
        entropy=torch.zeros((), device=DEVICE),
        z_loss=None,
        capacity=None,
    )


def slow_sum(x: Tensor, plan: RoutingPlan, w: dict[str, Tensor], activation: str) -> Tensor:
    """float64, a row at a time."""
    rows: list[Tensor] = [torch.zeros(w["b2"].size(1), dtype=torch.float64, device=x.device) for _ in x]
    pairs = zip(plan.expert_index_A.tolist(), plan.token_index_A.tolist(), plan.weight_A.double(), strict=True)
    for e, t, weight in pairs:
        pre = x[t].double() @ w["w1"][e].double() + w["b1"][e].double()
        hidden = ACTIVATIONS[activation].forward(pre)
        rows[t] = rows[t] + weight * (hidden @ w["w2"][e].double() + w["b2"][e].double())
    return torch.stack(rows) if rows else x.double()


def assert_experts(count_E: list[int], num_tokens: int, activation: str, dtype: torch.dtype = torch.float32) -> None:
    """``expert_sum`` and all its gradients on lists made from a torch plan; no width is whole blocks."""
    width, hidden, experts = 21, 35, len(count_E)
    plan = plan_of(count_E, num_tokens)
    shapes = {"w1": (experts, width, hidden), "b1": (experts, hidden), "w2": (experts, hidden, width)}
    generator = torch.Generator().manual_seed(1)
    leaves = {
        name: torch.randn(shape, generator=generator).mul_(0.3).to(DEVICE, dtype).requires_grad_()
        for name, shape in {**shapes, "b2": (experts, width)}.items()
    }
    x = torch.randn(num_tokens, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    pull = torch.randn(num_tokens, width, generator=generator).to(DEVICE, dtype)
    lists = lists_of(plan, dtype)
    assert_lists(lists, plan.expert_index_A.cpu(), plan.token_index_A.cpu())
    rule = kernel_experts.ExpertRule(activation, 0.0, dtype)
    got = kernel_experts.expert_sum(x, plan.weight_A, *leaves.values(), lists, rule)
    want = slow_sum(x, plan, leaves, activation)
    assert_near(got.double(), want, NEAR[dtype])
    wanted_for: list[Any] = [x, plan.weight_A, *leaves.values()]
    found = torch.autograd.grad(got, wanted_for, pull)
    if not want.requires_grad:  # no expert has a row
        assert not any(grad.any() for grad in found)
        return
    for mine, theirs in zip(found, torch.autograd.grad(want, wanted_for, pull.double()), strict=True):
        assert mine.dtype == theirs.dtype
        assert_near(mine.double(), theirs.double(), NEAR[dtype])


@pytest.mark.parametrize("activation", ["gelu", "gelu_fast", "relu", "silu"])
def test_activations_and_their_slopes(activation: str) -> None:
    assert_experts([5, 0, 3], 9, activation)


@triton.jit
def _activations_of(x, hidden, hidden_again, slope, NAME: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    pre = tl.load(x + place)
    unit, derivative = activate_with_slope(pre, NAME, EXACT)
    tl.store(hidden + place, activate(pre, NAME, EXACT))
    tl.store(hidden_again + place, unit)
    tl.store(slope + place, derivative)


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "for half precision"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_fast", "relu", "silu"])
def test_activations_of_every_size_err_by_units_of_the_last_place(activation: str, exact: bool) -> None:
    x = torch.cat([torch.linspace(-12, 12, 1017), torch.tensor([0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4])]).to(
        DEVICE
    )
    hidden, again, slope = (torch.empty_like(x) for _ in range(3))
    _activations_of[(1,)](x, hidden, again, slope, NAME=activation, EXACT=exact, BLOCK=1024)
    leaf = x.double().requires_grad_()
    want = ACTIVATIONS[activation].forward(leaf)
    (want_slope,) = torch.autograd.grad(want.sum(), leaf)
    allowed = 1e-6 * (1 + x.abs().double())
    assert torch.equal(hidden, again)
    assert ((hidden.double() - want).abs() <= allowed).all()
    assert ((slope.double() - want_slope).abs() <= allowed).all()


def test_experts_of_several_tiles_beside_idle_ones() -> None:
    """The plan of one rank's experts looks so under expert parallelism: loads are uneven, some rank has no row."""
    assert_experts([0, 41, 1, 0], 45, "gelu")
    assert_experts([0, 0], 3, "gelu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_half_precision(dtype: torch.dtype) -> None:
    assert_experts([0, 41, 1, 0], 45, "gelu", dtype)
