"""Experts for inference with int8 or bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..config import MoEConfig
from ..experts import few_rows
from ..experts.stacked import Experts
from ..native.rows import Int8Weights, combine, float_linear, int8_linear_of_floats
from ..plan import RoutingPlan
from .weights import StoredNumbers, dequantise, quantise_channels, with_sums


class _InferenceExperts(StoredNumbers):
    """The base of both kinds: no gradient, and float32 outside the matrices whatever dtype the model is cast to."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("b1", torch.zeros(config.num_experts, config.expert_dim))
        self.register_buffer("b2", torch.zeros(config.num_experts, config.embed_dim))

    @classmethod
    def state_shapes(cls, config: MoEConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything in the state dict."""
        return Experts.state_shapes(config)

    def forward(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """Sum over each token's kept experts of weight * expert(x): (T, D), dtype of ``x_TD``, no gradient.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError(
                f"moe_weights {self.config.weights} experts are for inference and cannot be trained: train the float "
                "checkpoint and quantise the result (xmoe checkpoint quantise)"
            )
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            rows_TD = x_TD.float().contiguous()
            by_token, by_number = few_rows.groups_of(plan)
            hidden_AF = ACTIVATIONS[self.config.activation].forward(self._first(rows_TD, by_token))
            out_AD = self._second(hidden_AF, by_number)
            weight_A = plan.weight_A.float().contiguous()
            return combine(out_AD, weight_A, plan.token_index_A, plan.num_tokens).to(x_TD.dtype)

    def _first(self, x_TD: Tensor, groups: Any) -> Tensor:
        raise NotImplementedError

    def _second(self, hidden_AF: Tensor, groups: Any) -> Tensor:
        raise NotImplementedError


class Int8Experts(_InferenceExperts):
    """Experts with int8 matrices, one scale per output channel; rows are quantised one by one.

    State: ``q1`` (E, F, D) and ``q2`` (E, D, F) int8, ``scale1`` (E, F) and ``scale2`` (E, D) float32, ``b1`` (E, F),
    ``b2`` (E, D). Loading also takes the float ``w1`` and ``w2`` of ``Experts`` and quantises them.
    """

    q1: Tensor
    q2: Tensor
    scale1: Tensor
    scale2: Tensor
    b1: Tensor
    b2: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        experts, width, hidden = config.num_experts, config.embed_dim, config.expert_dim
        self.register_buffer("q1", torch.zeros(experts, hidden, width, dtype=torch.int8))
        self.register_buffer("scale1", torch.zeros(experts, hidden))
        self.register_buffer("q2", torch.zeros(experts, width, hidden, dtype=torch.int8))
        self.register_buffer("scale2", torch.zeros(experts, width))
        self._ready: tuple[Int8Weights, Int8Weights] | None = None

    @classmethod
    def state_shapes(cls, config: MoEConfig) -> dict[str, tuple[int, ...]]:
        experts, width, hidden = config.num_experts, config.embed_dim, config.expert_dim
        shapes = super().state_shapes(config)
        for name in ("w1", "w2"):
            del shapes[name]
        return shapes | {
            "q1": (experts, hidden, width),
            "scale1": (experts, hidden),
            "q2": (experts, width, hidden),
            "scale2": (experts, width),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._ready = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._ready = None
        if prefix + "w1" in state_dict:
            state_dict.update(quantised_state(state_dict, prefix))
            for name in ("w1", "w2"):
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _weights(self) -> tuple[Int8Weights, Int8Weights]:
        if self._ready is None:
            self._ready = with_sums(self.q1, self.scale1, self.b1), with_sums(self.q2, self.scale2, self.b2)
        return self._ready

    def in_float(self, expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float32 w1 (D, F), b1 (F,), w2 (F, D), b2 (D,) that one expert's int8 matrices stand for."""
        w1 = dequantise(self.q1[expert], self.scale1[expert]).t()
        return w1, self.b1[expert], dequantise(self.q2[expert], self.scale2[expert]).t(), self.b2[expert]

    def _first(self, x_TD: Tensor, groups: Any) -> Tensor:
        return int8_linear_of_floats(x_TD, self._weights()[0], groups)

    def _second(self, hidden_AF: Tensor, groups: Any) -> Tensor:
        return int8_linear_of_floats(hidden_AF, self._weights()[1], groups)


class BFloat16Experts(_InferenceExperts):
    """Experts whose matrices are stored in bfloat16; rows and sums are float32.

    State: as ``Experts``, ``w1`` and ``w2`` in bfloat16. Loading also takes other dtypes.
    """

    w1: Tensor
    w2: Tensor
    b1: Tensor
    b2: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        experts, width, hidden = config.num_experts, config.embed_dim, config.expert_dim
        self.register_buffer("w1", torch.zeros(experts, width, hidden, dtype=torch.bfloat16))
        self.register_buffer("w2", torch.zeros(experts, hidden, width, dtype=torch.bfloat16))

    def in_float(self, expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float32 w1 (D, F), b1 (F,), w2 (F, D), b2 (D,) of one expert."""
        return self.w1[expert].float(), self.b1[expert], self.w2[expert].float(), self.b2[expert]

    def _first(self, x_TD: Tensor, groups: Any) -> Tensor:
        return float_linear(x_TD, self.w1, self.b1, groups, self._path(groups))

    def _second(self, hidden_AF: Tensor, groups: Any) -> Tensor:
        return float_linear(hidden_AF, self.w2, self.b2, groups, self._path(groups))

    def _path(self, groups: Any) -> str | None:
        """GEMMs on widened matrices where an expert has many rows; None: the kernels' own choice."""
        chosen = int((groups.start_E.diff() > 0).sum())
        return "torch" if groups.size >= few_rows.MANY_ROWS * chosen else None


# by the value of MoEConfig.weights
QUANTISED: dict[str, type[_InferenceExperts]] = {"int8": Int8Experts, "bfloat16": BFloat16Experts}


def quantised_state(state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The int8 tensors of one layer's experts, from its float ``w1`` (E, D, F) and ``w2`` (E, F, D)."""
    made = {}
    for number in (1, 2):
        weight_EIO = state_dict[f"{prefix}w{number}"]
        made[f"{prefix}q{number}"], made[f"{prefix}scale{number}"] = quantise_channels(weight_EIO.transpose(1, 2))
    return {name: tensor.contiguous() for name, tensor in made.items()}
