"""Small layers and the comparison with the slow reference, shared by the tests of the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import reference
from xmoe_fairseq.moe import MoEConfig, MoELayer, RoutingPlan
from xmoe_fairseq.moe.plan import Choices

WIDTH, HIDDEN, EXPERTS = 8, 12, 6
# every router with settings that make its tokens compete
ROUTERS: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.7},
    "top_k": {"top_k": 3},
    "top_k normalised": {"router": "top_k", "top_k": 2, "normalize_weights": True},
    "threshold normalised": {"router": "threshold", "threshold": 0.6, "normalize_weights": True},
    "switch": {},
    "hash": {},
    "base": {},
    "adamoe": {"top_k": 4, "num_null_experts": 3},
}
PATHS = ("bmm", "grouped", "loop", "masked")


def tiny_layer(case: str = "threshold", *, seed: int = 0, **settings: Any) -> MoELayer:
    """A layer of WIDTH x HIDDEN x EXPERTS with peaked routing, so that experts fill up."""
    torch.manual_seed(seed)
    chosen: dict[str, Any] = {"router": case, "embed_dim": WIDTH, "num_experts": EXPERTS, "expert_dim": HIDDEN}
    layer = MoELayer(MoEConfig(**{**chosen, **ROUTERS.get(case, {}), **settings}))
    if hasattr(layer.router, "weight"):
        torch.nn.init.normal_(layer.router.weight, std=0.6)
    return layer


def tokens(count: int, *, seed: int = 1, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, padded: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with a gradient, padding (True at ``padded``) and token ids."""
    padding = torch.zeros(count, dtype=torch.bool)
    padding[list(padded)] = True
    ids = torch.randint(4, 500, (count,), generator=torch.Generator().manual_seed(3))
    return tokens(count).requires_grad_(), padding, ids


def leaves_of(layer: MoELayer) -> dict[str, Tensor]:
    return dict(layer.named_parameters())


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of each leaf by name, zeros where the loss does not reach it."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def slow_forward(
    layer: MoELayer, x_TD: Tensor, padding: Tensor | None = None, token_ids: Tensor | None = None
) -> reference.SlowResult:
    """The reference on this layer's own parameters; gradients reach them."""
    config = layer.config
    padded = [False] * len(x_TD) if padding is None else padding.tolist()
    real = [token for token, pad in enumerate(padded) if not pad]
    routed = reference.route(
        config.router,
        x_TD,
        getattr(layer.router, "weight", None),
        real,
        num_experts=config.num_experts,
        threshold=config.threshold,
        top_k=config.top_k,
        normalize=config.normalize_weights,
        token_ids=None if token_ids is None else token_ids.tolist(),
        hash_seed=config.hash_seed,
        training=layer.training,
    )
    gamma = config.capacity_factor if layer.training else config.eval_capacity_factor
    capacity = reference.capacity_of(gamma, len(real), config.num_experts, config.min_capacity)
    experts = {name: getattr(layer.experts, name) for name in ("w1", "b1", "w2", "b2")}
    return reference.moe_layer(x_TD, padded, experts, routed, capacity=capacity, activation=config.activation)


def assert_near(got: Tensor, want: Tensor, relative: float = 1e-5) -> None:
    """Largest difference within ``relative`` of the largest value: sums run in another order."""
    assert got.shape == want.shape
    if not want.numel():
        return
    assert torch.isfinite(got).all()
    scale = float(want.detach().abs().max())
    worst = float((got.detach().double() - want.detach().double()).abs().max())
    assert worst <= relative * max(scale, 1e-30), f"differs by {worst:.3g}, largest value {scale:.3g}"


def assert_same_plan(plan: RoutingPlan, slow: reference.SlowResult) -> None:
    """Decisions exactly, weights within float32 rounding."""
    pairs = list(zip(plan.expert_index_A.tolist(), plan.token_index_A.tolist(), strict=True))
    assert pairs == slow.pairs  # also the order: by expert, then token
    assert plan.wanted_E.tolist() == slow.wanted
    counts = [sum(expert == e for e, _ in slow.pairs) for expert in range(len(slow.wanted))]
    assert plan.count_E.tolist() == counts
    assert plan.weight_A.dtype == torch.float32
    assert_near(plan.weight_A, slow.weight_TE[plan.token_index_A, plan.expert_index_A])
    assert_near(plan.balance_loss, slow.balance)


def in_order(choices: Choices) -> list[list[int]]:
    """The experts that each token takes, first choice first."""
    rows = zip(choices.expert_TK.tolist(), choices.chosen_TK.tolist(), strict=True)
    return [[expert for expert, taken in zip(*row, strict=True) if taken] for row in rows]
