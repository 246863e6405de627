"""The way that GPUs take: on CPU tensors with ``host.on_cpu`` replaced by False, and on a GPU where there is one.

Kernels of our own: test_gpu.py and kernels/.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.moe.helpers import PATHS, ROUTERS, assert_near, assert_same_plan, slow_forward, tiny_layer, tokens
from xmoe_fairseq.moe import MoELayer, RoutingPlan, host
from xmoe_fairseq.moe.experts import stacked
from xmoe_fairseq.moe.experts.layouts import has_grouped_kernel
from xmoe_fairseq.moe.experts.stacked import choose_path

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
COUNT = 60


def step(layer: MoELayer, device: str = "cpu") -> tuple[torch.Tensor, RoutingPlan, list[torch.Tensor]]:
    """Output, plan and gradients (on the CPU) of one training step with padding."""
    layer = layer.to(device)
    x = tokens(COUNT).to(device).requires_grad_()
    padding, ids = torch.arange(COUNT) % 7 == 0, torch.arange(COUNT)
    y, plan = layer(x, padding=padding.to(device), token_ids=ids.to(device))
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(y.square().sum() + plan.balance_loss, leaves, allow_unused=True)
    return y.cpu(), plan, [grad.cpu() for grad in grads if grad is not None]


def assert_same_step(one: tuple[Any, ...], other: tuple[Any, ...], relative: float = 1e-5) -> None:
    for name in ("token_index_A", "expert_index_A", "count_E", "wanted_E"):
        assert getattr(one[1], name).tolist() == getattr(other[1], name).tolist()
    assert_near(one[0], other[0], relative)
    for mine, theirs in zip(one[2], other[2], strict=True):
        assert_near(mine, theirs, relative)


@pytest.mark.parametrize("settings", [{}, {"capacity_factor": 0.5, "min_capacity": 1}, {"capacity_factor": None}])
@pytest.mark.parametrize("compute", ["auto", *PATHS])
@pytest.mark.parametrize("case", ROUTERS)
def test_without_reading_values_plan_and_output_are_the_same(
    case: str, compute: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step(tiny_layer(case, compute=compute, **settings))
    monkeypatch.setattr(host, "on_cpu", lambda tensor: False)
    assert_same_step(step(tiny_layer(case, compute=compute, **settings)), expected)


@pytest.mark.parametrize("case", ["threshold", "adamoe", "hash"])
def test_without_reading_values_plans_are_those_of_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "on_cpu", lambda tensor: False)
    layer = tiny_layer(case, capacity_factor=0.7, min_capacity=1)
    x, ids = tokens(COUNT), torch.arange(COUNT)
    padding = ids % 5 == 0
    assert_same_plan(layer(x, padding, ids)[1], slow_forward(layer, x, padding, ids))


def test_grouped_where_torch_has_a_kernel_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny_layer("switch", embed_dim=8, expert_dim=512, capacity_factor=None)
    plan = layer(tokens(COUNT))[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert has_grouped_kernel(gpu, torch.bfloat16)
    assert not has_grouped_kernel(gpu, torch.float16)
    assert not has_grouped_kernel(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not has_grouped_kernel(gpu, torch.bfloat16)

    monkeypatch.setattr(stacked, "has_grouped_kernel", lambda device, dtype: True)
    assert choose_path(layer.config, plan, torch.bfloat16) == "grouped"
    assert choose_path(replace(layer.config, expert_dim=509), plan, torch.bfloat16) == "bmm"  # not whole 16 bytes


@pytest.mark.parametrize(("padded", "waits"), [(False, ["nonzero"]), (True, ["_local_scalar_dense", "nonzero"])])
@pytest.mark.parametrize("case", ["threshold", "top_k", "hash", "adamoe"])
def test_the_host_waits_for_the_list_of_pairs_and_with_padding_for_the_capacity(
    case: str, padded: bool, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "on_cpu", lambda tensor: False)
    layer = tiny_layer(case, compute="grouped")
    x, ids = tokens(COUNT).requires_grad_(), torch.arange(COUNT)
    with Waits() as seen:
        y, plan = layer(x, padding=ids % 7 == 0 if padded else None, token_ids=ids)
        (y.square().sum() + plan.balance_loss).backward()
    assert seen.names == waits


class Waits(TorchDispatchMode):
    """Names of the operations for whose result, or size of result, a CPU waits if the tensors are on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_consecutive", "_unique2"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@NEEDS_GPU
@pytest.mark.parametrize("compute", ["auto", *PATHS])
@pytest.mark.parametrize("case", ROUTERS)
def test_a_gpu_decides_and_computes_what_a_cpu_does(case: str, compute: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_same_step(step(tiny_layer(case, compute=compute), "cuda"), step(tiny_layer(case, compute=compute)), 1e-4)


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", ["auto", "bmm", "loop"])
def test_half_precision_on_a_gpu_is_near_single(compute: str, dtype: torch.dtype) -> None:
    layer = tiny_layer("threshold", compute=compute, embed_dim=64, expert_dim=128).cuda()
    x = tokens(COUNT, width=64).cuda()
    with torch.no_grad():
        expected, plan = layer(x)
        with torch.autocast("cuda", dtype=dtype):
            y, half_plan = layer(x)
        assert_near(y.float().cpu(), expected.cpu(), 0.03)
        # the router computes in float32, whatever the experts do
        assert torch.equal(plan.expert_index_A, half_plan.expert_index_A)
