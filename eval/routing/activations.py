"""Compute the hidden units of experts and dense FFNs again, for a bounded sample of rows.

Axis letters: T tokens, D model width, F hidden units, E experts, R sampled rows, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eval.routing.layers import moe_layers
from eval.routing.sums import rounded
from xmoe_fairseq.moe import MoELayer, RoutingPlan
from xmoe_fairseq.moe.activations import ACTIVATIONS

ROWS_PER_BATCH = 256  # rows whose hidden units are computed, per layer and sampled batch
PROBE_TOKENS = 64  # tokens on which all experts of a layer are compared


class InsideLayers:
    """Counts of positive hidden units and a sample of inputs, collected while the block of `watching` runs."""

    def __init__(self, model: nn.Module, seed: int = 1) -> None:
        self.layers = moe_layers(model)
        self.dense = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "fc1", None), nn.Linear)
            and isinstance(getattr(module, "fc2", None), nn.Linear)
        }
        self.positive: dict[str, float] = {}
        self.units: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.probe: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def watching(self, real_T: dict[str, Tensor]) -> Iterator[None]:
        """Collect from the forward passes in the block; ``real_T``: side -> bool (T,), False at padding, time-major."""
        handles = []
        for name, layer in self.layers.items():
            if layer.config.merge_experts:
                continue  # in merged layers no row passes through a single expert
            handles.append(layer.register_forward_hook(self._moe_hook(name)))
        for name, module in self.dense.items():
            side = "encoder" if "encoder" in name else "decoder"
            if side in real_T:
                handles.append(module.fc1.register_forward_hook(self._dense_hook(name, real_T[side])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _sample(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)[:ROWS_PER_BATCH]

    def _moe_hook(self, name: str) -> Any:
        def hook(layer: MoELayer, inputs: tuple[Tensor, ...], output: tuple[Tensor, RoutingPlan]) -> None:
            x_TD, plan = inputs[0].reshape(-1, inputs[0].size(-1)), output[1]
            chosen = self._sample(plan.token_index_A.numel()).to(x_TD.device)
            if chosen.numel():
                rows_RD = x_TD.index_select(0, plan.token_index_A[chosen])
                self._count(name, expert_hidden(layer, rows_RD, plan.expert_index_A[chosen]))
            self._keep_probe(name, x_TD, plan)

        return hook

    def _dense_hook(self, name: str, real_T: Tensor) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            rows = output.reshape(-1, output.size(-1))[real_T]
            self._count(name, [rows[self._sample(rows.size(0)).to(rows.device)]])

        return hook

    def _count(self, name: str, hidden: Any) -> None:
        for pre_RF in hidden:  # GELU, ReLU and SiLU are positive exactly where their input is
            self.positive[name] = self.positive.get(name, 0.0) + float((pre_RF > 0).sum())
            self.units[name] = self.units.get(name, 0) + pre_RF.numel()
            self.rows[name] = self.rows.get(name, 0) + pre_RF.size(0)

    def _keep_probe(self, name: str, x_TD: Tensor, plan: RoutingPlan) -> None:
        if name not in self.probe and plan.token_index_A.numel():
            tokens = plan.token_index_A.unique()
            picked = torch.linspace(0, tokens.numel() - 1, min(PROBE_TOKENS, tokens.numel()), device=tokens.device)
            self.probe[name] = x_TD.index_select(0, tokens[picked.round().long()]).detach().clone()

    def positive_share(self, name: str) -> dict[str, Any] | None:
        """Mean share of positive hidden units, and the number of rows; None where no row ran."""
        if not self.units.get(name):
            return None
        return {"share": self.positive[name] / self.units[name], "rows": self.rows[name]}

    @torch.no_grad()
    def similarity(self, name: str) -> dict[str, Any]:
        """Cosines between experts, of their outputs on the same sampled tokens and of their router rows."""
        layer = self.layers[name]
        gate = layer.gate1 if layer.config.merge_experts else layer.router
        router = getattr(gate, "weight", None)
        return {
            "outputs": output_cosine(layer, self.probe[name]) if name in self.probe else None,
            "router_rows": None if router is None else rounded(_cosine(router.detach()[: layer.config.num_experts])),
        }


def expert_hidden(layer: MoELayer, rows_RD: Tensor, expert_R: Tensor) -> Iterator[Tensor]:
    """Pre-activations of each row in its own expert, as (rows of one expert, F), expert by expert."""
    experts = layer.experts
    for e in expert_R.unique().tolist():
        w1_DF, b1_F, _, _ = experts.in_float(e)
        yield torch.addmm(b1_F, rows_RD[expert_R == e].float(), w1_DF)


def output_cosine(layer: MoELayer, probe_SD: Tensor) -> list[list[float]]:
    """(E, E): cosine of two experts' outputs for the same token, averaged over the sampled tokens."""
    experts, activation = layer.experts, ACTIVATIONS[layer.config.activation].forward
    outputs = []
    for e in range(layer.config.num_experts):
        w1_DF, b1_F, w2_FD, b2_D = experts.in_float(e)
        outputs.append(torch.addmm(b2_D, activation(torch.addmm(b1_F, probe_SD.float(), w1_DF)), w2_FD))
    normal_ESD = nn.functional.normalize(torch.stack(outputs), dim=-1)
    return rounded(torch.einsum("esd,fsd->ef", normal_ESD, normal_ESD) / probe_SD.size(0))


def _cosine(weight_ED: Tensor) -> Tensor:
    normal = nn.functional.normalize(weight_ED.float(), dim=-1)
    return normal @ normal.t()
