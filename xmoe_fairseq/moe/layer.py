"""MoELayer: route, dispatch, compute, combine; no mathematics of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import kernels
from .activations import ACTIVATIONS
from .capacity import make_plan
from .config import MoEConfig
from .context import SentenceContext
from .experts.ranks import build_experts, experts_class
from .experts.stacked import compute_dtype
from .plan import RoutingPlan
from .registry import LAYERS, register_layer, router_class


class _BuildsItsKind(type):
    """``MoELayer(config)`` builds the class registered for ``config.layer_kind``; a subclass builds itself."""

    def __call__(cls, config: MoEConfig) -> Any:
        routed: Any = LAYERS["routed"]
        kind: Any = LAYERS[config.layer_kind] if cls is routed else cls
        return type.__call__(kind, config)


@register_layer("routed")
class MoELayer(nn.Module, metaclass=_BuildsItsKind):
    """A sparse mixture of experts in place of a transformer's feed-forward network.

    ``y, plan = layer(x, padding=None, token_ids=None)``. The output of a token depends on that token alone unless a
    capacity is in force (training, or ``eval_capacity_factor``).

    State: ``router.*`` (routers/), ``experts.{w1,b1,w2,b2}`` (experts/stacked.py), ``shared.*`` with a shared
    expert.

    With ``config.merge_experts`` the registered kind is ``MergedMoELayer`` (merged/layer.py), a subclass, which
    callers use in the same way.
    """

    own_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = router_class(config.router)(config)
        self.experts = build_experts(config)
        self.shared = SharedExpert(config) if config.shared_expert_dim else None

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        """Raise ValueError when this kind of layer cannot serve ``config``; the router checks its own settings."""
        if config.token_adapter:
            raise ValueError("moe_token_adapter needs moe_merge_experts; set both or neither")

    @classmethod
    def state_shapes(cls, config: MoEConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the experts' and the router's part of the state dict."""
        router = router_class(config.router).state_shapes(config)
        experts = experts_class(config).state_shapes(config)
        return _inside("experts", experts) | _inside("router", router)

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        token_ids: Tensor | None = None,
        context: SentenceContext | None = None,
    ) -> tuple[Tensor, RoutingPlan]:
        """Route every token that is not padding.

        Args:
            x: floating point (..., D).
            padding: bool (...), True at padding, which is not routed and not counted anywhere; the output there is 0.
            token_ids: int64 (...), vocabulary indices; required by the hash router.
            context: used by merged experts alone (merged/layer.py).
        Returns:
            ``y`` like ``x``, and the plan that was computed.
        Raises:
            ValueError: shapes that do not fit, or a missing input.
        """
        self._check_inputs(x, padding, token_ids)
        return self._forward(x, padding, token_ids, context)

    def _forward(
        self, x: Tensor, padding: Tensor | None, token_ids: Tensor | None, _context: SentenceContext | None
    ) -> tuple[Tensor, RoutingPlan]:
        """``forward`` of this kind of layer, on inputs whose shapes fit."""
        x_TD = x.reshape(-1, x.size(-1))
        padding_T = None if padding is None else padding.reshape(-1).bool()
        ids_T = None if token_ids is None else token_ids.reshape(-1)
        dtype = compute_dtype(x)
        by_kernels = kernels.chosen(self.config, x.device, dtype, self.training)
        if padding_T is not None and (not by_kernels or self.shared is not None):
            # a NaN at padding would reach the gradient of shared weights as 0 * NaN
            x_TD = x_TD.masked_fill(padding_T.unsqueeze(-1), 0.0)
        if by_kernels:
            x_TD, plan = kernels.make_plan(self.router, x_TD, padding_T, ids_T, self.training, dtype)
        else:
            plan = self._torch_plan(x_TD, padding_T, ids_T)
        y_TD = self.experts(x_TD, plan)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, padding_T)
        return y_TD.to(x.dtype).view(x.shape), plan

    def _torch_plan(self, x_TD: Tensor, padding_T: Tensor | None, ids_T: Tensor | None) -> RoutingPlan:
        """Route and apply the capacity with torch."""
        real_T = None if padding_T is None else ~padding_T
        num_tokens, device = x_TD.size(0), x_TD.device
        # torch.tensor(number, device="cuda") would be a copy that the host waits for
        num_real = torch.full((), num_tokens, device=device) if real_T is None else real_T.sum()
        limited = (self.config.capacity_factor if self.training else self.config.eval_capacity_factor) is not None
        capacity = None
        if limited:
            # on CUDA with padding the host waits for this number; listing the pairs is the other wait
            capacity = self.config.capacity(num_tokens if real_T is None else int(num_real), self.training)
        choices = self.router(x_TD, real_T, ids_T)
        return make_plan(choices, capacity=capacity, num_real_tokens=num_real, row_cost=self.config.row_cost)

    def _check_inputs(self, x: Tensor, padding: Tensor | None, token_ids: Tensor | None) -> None:
        if x.size(-1) != self.config.embed_dim or not x.is_floating_point():
            raise ValueError(f"x must be floating point (..., {self.config.embed_dim}), got {x.dtype} {tuple(x.shape)}")
        for name, given in (("padding", padding), ("token_ids", token_ids)):
            if given is not None and given.shape != x.shape[:-1]:
                raise ValueError(f"{name} has shape {tuple(given.shape)}, x needs {tuple(x.shape[:-1])}")


def _inside(part: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{part}.{name}": shape for name, shape in shapes.items()}


class SharedExpert(nn.Module):
    """A dense FFN for all tokens beside the chosen experts (DeepSeekMoE, arXiv 2401.06066); output 0 at padding."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.shared_expert_dim)
        self.fc2 = nn.Linear(config.shared_expert_dim, config.embed_dim)
        self.activation = ACTIVATIONS[config.activation].forward

    def forward(self, x_TD: Tensor, padding_T: Tensor | None) -> Tensor:
        y_TD: Tensor = self.fc2(self.activation(self.fc1(x_TD)))
        return y_TD if padding_T is None else y_TD.masked_fill(padding_T.unsqueeze(-1), 0.0)


@contextmanager
def record_plans(module: nn.Module) -> Iterator[dict[str, list[RoutingPlan]]]:
    """Collect the plans of every MoE layer inside ``module`` while the block runs: layer name -> plans in call order.

    Every layer has an entry, empty when it did not run (LayerDrop). Plans come with gradient. Under activation
    checkpointing (non-reentrant) the recomputation runs after the block and is not recorded twice.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, MoELayer)}
    plans: dict[str, list[RoutingPlan]] = {name: [] for name in layers}

    def keep(name: str):  # type: ignore[no-untyped-def]
        return lambda _layer, _inputs, output: plans[name].append(output[1])

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield plans
    finally:
        for handle in handles:
            handle.remove()
