"""The Triton way to compute a layer (``moe_compute triton``): where it can be used, and its two entrances.

Importing this module does not import Triton; calling ``make_plan`` or ``expert_sum`` does. ``auto`` takes this way on
CUDA devices where Triton imports and a self-check agrees with the torch way. With ``TRITON_INTERPRET=1`` in the
environment, set before Triton is imported, ``moe_compute triton`` runs on CPU tensors too, slowly, for tests.

    gate.py       logits in float32, and the two gradients of the gate
    route.py      probabilities, ranks, choice; its gradient
    few.py        all of this in one launch, for a few tokens without capacity and gradient
    serve.py      pairs that are kept under capacity; rows by expert and by token
    grouped.py    products of ragged rows with their experts' matrices
    combine.py    sums of a token's rows; gradients of the rows' weights and of biases
    gating.py, serving.py, routing.py, experts.py    their host sides: shapes, buffers, launches, autograd
    plan.py       a routing plan whose counts stay on the device
    check.py      the self-check
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..config import MoEConfig
from ..plan import RoutingPlan
from ..registry import router_class

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def chosen(config: MoEConfig, device: torch.device, dtype: torch.dtype, training: bool) -> bool:
    """True if a layer of ``config`` computes with kernels on ``device`` in ``dtype``.

    Raises:
        RuntimeError: ``moe_compute triton`` was asked for by name and cannot run, with the reason.
    """
    if config.compute not in ("auto", "triton") or config.weights != "float":
        return False
    by_name = config.compute == "triton"
    if not by_name and (device.type != "cuda" or _takes_all(config, training)):
        return False
    reason = _obstacle(device, dtype)
    if reason is not None and by_name:
        raise RuntimeError(f"moe_compute triton cannot run here: {reason}; choose moe_compute auto")
    return reason is None


def _takes_all(config: MoEConfig, training: bool) -> bool:
    """True if every token takes every expert: then one dense product without gathering is cheaper (path "masked")."""
    takes_all = router_class(config.router).experts_wanted(config) == config.num_experts
    return takes_all and config.capacity_fraction(training) is None


@cache
def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why kernels cannot be used, found once per device and dtype; None if they can."""
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(str(known) for known in DTYPES)}, not {dtype}"
    if find_spec("triton") is None:
        return "the package triton is not installed (CUDA builds of torch on Linux bring it)"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != "cuda":
        return None if interpreted else f"tensors lie on {device.type}, which only TRITON_INTERPRET=1 serves"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    from .check import self_check

    reason = self_check(device, dtype, make_plan, expert_sum)
    if reason is not None:
        logger.warning(
            "moe_compute: kernels are not used on %s in %s, torch computes instead: %s", device, dtype, reason
        )
    return reason


def make_plan(
    router: Any,
    x_TD: Tensor,
    padding_T: Tensor | None,
    token_ids_T: Tensor | None,
    training: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, RoutingPlan]:
    """Route tokens (T, D) without waiting for the device: the plan's lists of pairs are made at their first use.

    Returns the tokens too: the experts must read these, so that one kernel adds the gradients of gate and experts.

    Args:
        router: a ``Router``. If it has a kernel rule, the kernels choose; else torch chooses, and the kernels apply the
            capacity.
        padding_T: bool, True at padding; None when nothing is padding.
        dtype: the dtype in which the experts compute; it decides the size of row tiles.
    """
    from . import routing

    rule = router.kernel_rule() if not router._forward_hooks else None
    if rule is not None:
        return routing.route(x_TD, router.weight, padding_T, rule, router.config, training, dtype)
    if padding_T is not None:
        # a NaN at padding would reach the gradient of shared weights as 0 * NaN
        x_TD = x_TD.masked_fill(padding_T.unsqueeze(-1), 0.0)
    choices = router(x_TD, None if padding_T is None else ~padding_T, token_ids_T)
    return x_TD, routing.plan_choices(choices, padding_T, router.config, training, dtype)


def expert_sum(experts: Any, x_TD: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
    """Sum over each token's kept experts of weight * expert(x): (T, D) in ``dtype``; ``experts`` is an ``Experts``."""
    from . import experts as kernel_experts
    from .plan import DevicePlan, lists_of

    config = experts.config
    rule = kernel_experts.ExpertRule(config.activation, config.activation_dropout if experts.training else 0.0, dtype)
    if isinstance(plan, DevicePlan):
        lists, weight_R = plan.lists, plan.weight_R
    else:
        lists, weight_R = lists_of(plan, dtype), plan.weight_A
    parameters = (experts.w1, experts.b1, experts.w2, experts.b2)
    return kernel_experts.expert_sum(x_TD, weight_R, *parameters, lists, rule)
