"""A step of a layer by kernels and by torch: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.moe.helpers import assert_near
from xmoe_fairseq.moe import MoELayer, RoutingPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value: sums run in another order, in the dtype of the experts.
NEAR = {torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass
class Step:
    """One forward and backward pass; ``grads`` by name, ``x`` among them."""

    y: Tensor
    plan: RoutingPlan
    grads: dict[str, Tensor]


def padded(count: int, every: int = 7) -> Tensor:
    """Each seventh token is padding, the first one too."""
    return torch.arange(count) % every == 0


def run(layer: MoELayer, x_TD: Tensor, padding: Tensor | None = None, token_ids: Tensor | None = None) -> Step:
    """A training step of ``layer`` on DEVICE: the loss is sum(y^2), plus the layer's own losses."""
    layer = layer.to(DEVICE)
    leaf = x_TD.to(DEVICE).detach().requires_grad_()
    ids = torch.arange(x_TD.size(0)) if token_ids is None else token_ids
    y, plan = layer(leaf, None if padding is None else padding.to(DEVICE), ids.to(DEVICE))
    loss = y.float().square().sum() + plan.balance_loss
    if plan.z_loss is not None:
        loss = loss + plan.z_loss
    leaves = {"x": leaf, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return Step(y.detach(), plan, {name: g for name, g in zip(leaves, grads, strict=True) if g is not None})


def by_torch(layer: MoELayer) -> MoELayer:
    """The same layer, computed by torch, an expert at a time."""
    twin = copy.deepcopy(layer)
    for module in (twin, twin.router, twin.experts):
        module.config = replace(module.config, compute="loop")
    return twin


def assert_same_decisions(got: RoutingPlan, want: RoutingPlan) -> None:
    for name in ("token_index_A", "expert_index_A", "count_E", "wanted_E", "experts_per_token_T", "num_real_tokens"):
        mine, theirs = getattr(got, name), getattr(want, name)
        assert mine.dtype == theirs.dtype, name
        assert mine.tolist() == theirs.tolist(), name
    assert (got.capacity, got.num_tokens, got.row_cost) == (want.capacity, want.num_tokens, want.row_cost)


def assert_same_step(got: Step, want: Step, relative: float) -> None:
    """Decisions exactly; output, statistics and gradients within ``relative`` of each one's largest value."""
    assert_same_decisions(got.plan, want.plan)
    assert got.y.dtype == want.y.dtype
    assert_near(got.y.float(), want.y.float(), relative)
    for name in ("weight_A", "entropy", "balance_loss"):
        assert_near(getattr(got.plan, name), getattr(want.plan, name), 3e-5)
    assert (got.plan.z_loss is None) == (want.plan.z_loss is None)
    assert got.grads.keys() == want.grads.keys()
    for name, grad in got.grads.items():
        assert grad.dtype == want.grads[name].dtype, name
        assert_near(grad.float(), want.grads[name].float(), relative)


def assert_ways_agree(layer: MoELayer, *inputs: Any, relative: float | None = None) -> Step:
    """Kernels (``layer`` has compute="triton") against torch, on the same inputs."""
    assert layer.config.compute == "triton"
    got = run(layer, *inputs)
    assert type(got.plan).__name__ == "DevicePlan"  # the kernels did run
    assert_same_step(got, run(by_torch(layer), *inputs), relative or NEAR[inputs[0].dtype])
    return got


def assert_lists(lists: Any, expert_A: Tensor, token_A: Tensor) -> None:
    """Every way in which the lists name the kept pairs names all of them, once, in the stated order."""
    num_rows, height = expert_A.numel(), lists.tile_rows
    assert lists.token_R[:num_rows].tolist() == token_A.tolist()
    count_E = torch.bincount(expert_A, minlength=lists.num_experts)
    assert lists.count_E.tolist() == count_E.tolist()
    assert lists.row_end_E.tolist() == count_E.cumsum(0).tolist()
    wanted_tiles = []
    for expert, (count, end) in enumerate(zip(count_E.tolist(), count_E.cumsum(0).tolist(), strict=True)):
        wanted_tiles += [[expert, row, end] for row in range(end - count, end, height)]
    assert [tile for tile in lists.tile_N3.tolist() if tile[1] < tile[2]] == wanted_tiles
    rows: list[list[int]] = [[] for _ in range(lists.num_tokens)]
    for row, token in enumerate(token_A.tolist()):
        rows[token].append(row)
    found = zip(lists.row_TK.tolist(), lists.count_T.tolist(), strict=True)
    assert [row_K[:count] for row_K, count in found] == rows
