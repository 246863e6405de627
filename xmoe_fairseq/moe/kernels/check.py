"""The self-check: a small training step and a few tokens, against the torch way, once per device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import MoEConfig
from ..plan import RoutingPlan
from ..registry import LAYERS

# The largest difference allowed, relative to the largest value: sums run in another order, in the experts' dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
NUM_TOKENS, NUM_FEW = 200, 20


def self_check(
    device: torch.device, dtype: torch.dtype, make_plan: Callable[..., Any], expert_sum: Callable[..., Any]
) -> str | None:
    """None if both ways agree, else what differs or failed. Random generators are restored.

    ``make_plan`` and ``expert_sum`` are those of this package, which imports this module.
    """
    config = MoEConfig(embed_dim=64, num_experts=8, expert_dim=96, threshold=0.7, compute="loop")
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(1)
            layer = LAYERS["routed"](config)
            torch.nn.init.normal_(layer.router.weight, std=0.3)
            layer.experts.to(dtype)
            layer.to(device)
            x_TD = torch.randn(NUM_TOKENS, config.embed_dim).to(device, dtype).requires_grad_()
            grad_TD = torch.randn(NUM_TOKENS, config.embed_dim).to(device, dtype)
            padding_T = torch.arange(NUM_TOKENS, device=device) % 9 == 0
            y_TD, plan = layer(x_TD, padding=padding_T)
            wanted = _gradients(layer, x_TD, grad_TD, y_TD, plan)
            x_read, plan = make_plan(layer.router, x_TD, padding_T, None, True, dtype)
            got = _gradients(layer, x_TD, grad_TD, expert_sum(layer.experts, x_read, plan, dtype), plan)
            return _difference(wanted, got, dtype) or _difference_of_few(layer.eval(), x_TD, make_plan, dtype)
    except Exception as error:  # compilers and drivers raise errors of many types
        lines = str(error).strip().splitlines() or [repr(error)]
        return f"{type(error).__name__}: {lines[0]}"


def _difference_of_few(
    layer: torch.nn.Module, x_TD: Tensor, make_plan: Callable[..., Any], dtype: torch.dtype
) -> str | None:
    """As in decoding, where another kernel routes."""
    with torch.no_grad():
        _, wanted = layer(x_TD[:NUM_FEW])
        _, got = make_plan(layer.router, x_TD[:NUM_FEW], None, None, False, dtype)
    for name in ("token_index_A", "expert_index_A"):
        if not torch.equal(getattr(wanted, name), getattr(got, name)):
            return f"{name} of {NUM_FEW} tokens differ"
    worst = float((wanted.weight_A - got.weight_A).abs().max())
    return None if worst <= TOLERANCE[torch.float32] else f"weight_A of {NUM_FEW} tokens differ by {worst:.3g}"


def _gradients(layer: torch.nn.Module, x_TD: Tensor, grad_TD: Tensor, y_TD: Tensor, plan: RoutingPlan) -> list[Tensor]:
    loss = (y_TD * grad_TD).float().sum() + plan.balance_loss
    gradients = torch.autograd.grad(loss, [x_TD, *layer.parameters()])
    return [plan.count_E, plan.wanted_E, y_TD, plan.balance_loss, plan.entropy, *gradients]


def _difference(wanted: list[Tensor], got: list[Tensor], dtype: torch.dtype) -> str | None:
    names = ("counts", "wanted counts", "output", "balance loss", "entropy", "x", "router", "w1", "b1", "w2", "b2")
    for name, right, other in zip(names, wanted, got, strict=True):
        exact = not right.is_floating_point()
        scale = float(right.detach().abs().max())
        worst = float((right.detach().double() - other.detach().double()).abs().max())
        # a NaN compares as not less or equal
        if not worst <= (0.0 if exact else TOLERANCE[dtype] * max(scale, 1e-6)):
            return f"{name} of a small training step differ by {worst:.3g} where the largest value is {scale:.3g}"
    return None
