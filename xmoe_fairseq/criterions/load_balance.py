"""Stock cross entropies plus the balance loss, summed over MoE layers.

The balance loss of a forward pass is a mean over its tokens. It is multiplied by the sample size, by which fairseq
later divides, so that its weight does not depend on --update-freq, batch size or ranks. Across data-parallel ranks the
load (f of Eq 7) is summed first, so that the loss is exactly that of the global batch. Each micro-batch of
--update-freq has its own f, and the result is their mean weighted by sample size.

The logged ``loss`` is the cross entropy alone, as for dense models; ``moe_balance`` is the balance loss.
"""

# No "from __future__ import annotations" here: fairseq reads the types of dataclass fields.

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from torch import Tensor

from ..moe import MoELayer, RoutingPlan
from ..moe.balance import BalanceTerms, SpreadTerms
from ..moe.registry import router_class
from ..moe.settings import not_negative
from ..moe.statistics import FIGURES, routing_figures, routing_sums

Plans = dict[str, list[RoutingPlan]]
Terms = BalanceTerms | SpreadTerms


def _balance_weight() -> Any:
    return field(default=0.01, metadata={"help": "weight of the balance loss, summed over MoE layers (0: none)"})


def _checked(balance_loss_weight: float) -> float:
    if not not_negative(balance_loss_weight):
        raise ValueError(
            f"balance_loss_weight ({balance_loss_weight}) must not be negative; 0.01 is the paper's, 0 turns it off"
        )
    return balance_loss_weight


@dataclass
class LabelSmoothedLoadBalanceConfig(LabelSmoothedCrossEntropyCriterionConfig):
    balance_loss_weight: float = _balance_weight()


@dataclass
class LoadBalanceConfig(CrossEntropyCriterionConfig):
    balance_loss_weight: float = _balance_weight()


class _KeepOutput:
    """Replaces the model while the stock criterion runs, and keeps the output of the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._model(*args, **kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _LoadBalance:
    """Mixed in front of a stock criterion."""

    balance_loss_weight: float

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """The stock loss plus weight * sample size * (balance loss + z-losses); routing sums are logged."""
        kept = _KeepOutput(model)
        loss, sample_size, logging_output = super().forward(kept, sample, reduce)
        plans: Plans = kept.output[1].get("moe_plans", {})
        every_plan = [plan for layer in plans.values() for plan in layer]
        for plan in every_plan:
            if plan.z_loss is not None:
                loss = loss + plan.z_loss * sample_size
        if self.balance_loss_weight:
            loss = loss + self.balance_loss_weight * _scaled_balance(model, plans, sample, sample_size)
        logging_output.update(_logged_sums(plans, loss))
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the stock metrics, and ``moe_*`` figures per layer and over all layers."""
        super().reduce_metrics(logging_outputs)
        _log_routing(logging_outputs)


@register_criterion("label_smoothed_cross_entropy_with_load_balance", dataclass=LabelSmoothedLoadBalanceConfig)
class LabelSmoothedLoadBalanceCriterion(_LoadBalance, LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross entropy + balance loss, for translation."""

    def __init__(self, task: Any, balance_loss_weight: float, **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
        self.balance_loss_weight = _checked(balance_loss_weight)

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "LabelSmoothedLoadBalanceCriterion":
        names = (
            "sentence_avg",
            "label_smoothing",
            "ignore_prefix_size",
            "report_accuracy",
            "balance_loss_weight",
        )
        return cls(task, **{name: getattr(cfg, name) for name in names})


@register_criterion("cross_entropy_with_load_balance", dataclass=LoadBalanceConfig)
class LoadBalanceCriterion(_LoadBalance, CrossEntropyCriterion):
    """Cross entropy + balance loss, for language models."""

    def __init__(self, task: Any, sentence_avg: bool, balance_loss_weight: float) -> None:
        super().__init__(task, sentence_avg)
        self.balance_loss_weight = _checked(balance_loss_weight)


def _scaled_balance(model: Any, plans: Plans, sample: Any, sample_size: Any) -> Tensor | float:
    """Sum over layers of the balance loss, times the sample size; in training both are of all ranks together."""
    terms = {
        name: [plan.balance for plan in layer_plans if plan.balance is not None] for name, layer_plans in plans.items()
    }
    if model.training and plans and distributed_utils.get_data_parallel_world_size() > 1:
        layers = (module for module in model.modules() if isinstance(module, MoELayer))
        gates = [router_class(layer.config.router).num_gates(layer.config) for layer in layers]
        return _global_balance(list(terms.values()), gates, sample_size, is_dummy=sample.get("is_dummy_batch", False))
    every_term = [term for layer_terms in terms.values() for term in layer_terms]
    return sum(term.loss() for term in every_term) * sample_size if every_term else 0.0


def _global_balance(terms: list[list[Terms]], gates: list[int], sample_size: Any, *, is_dummy: bool) -> Tensor | float:
    """Balance losses times sample size of the batch of all data-parallel ranks, in one all-reduce.

    Args:
        terms: balance terms of each MoE layer; empty if the layer did not run on this rank (LayerDrop draws for each
            rank) or its router has no balance loss.
        gates: rows of each MoE layer's gate, null experts among them. They fix the length of the summed tensor on
            every rank.
        is_dummy: True if this rank has no batch left at the uneven end of an epoch; a dummy batch counts nowhere.
    """
    device = next((layer[0].counts().device for layer in terms if layer), torch.device("cpu"))
    if torch.is_tensor(sample_size):
        device = sample_size.device
    widths = [2 * count + 1 for count in gates]  # SpreadTerms has the longest counts(), two rows
    summed = torch.zeros(sum(widths) + 1, device=device)
    parts = summed.split([*widths, 1])
    if not is_dummy:
        parts[-1].fill_(sample_size)
        for part, layer in zip(parts, terms, strict=False):
            if layer:
                counts = _only(layer).counts()
                part[: counts.numel()] = counts
    distributed_utils.all_reduce(summed, group=distributed_utils.get_data_parallel_group())
    total: Tensor | float = 0.0
    for part, layer in zip(parts, terms, strict=False):
        if layer:
            term = _only(layer)
            total = total + term.with_counts(part[: term.counts().numel()]).loss()
    return total * parts[-1][0]


def _only(layer: list[Terms]) -> Terms:
    if len(layer) != 1:
        raise ValueError(
            f"a MoE layer ran {len(layer)} times in one forward pass; the balance loss of several ranks is defined for "
            "one pass a layer: call each layer once, train on one rank, or set balance_loss_weight 0"
        )
    return layer[0]


_LAYER_NAME = re.compile(r"(encoder|decoder)\b.*\blayers\.(\d+)\b")


def layer_label(module_name: str) -> str:
    """``encoder.layers.1.moe`` -> ``moe_encoder_1``: the name under which a layer's figures are logged."""
    match = _LAYER_NAME.search(module_name)
    return f"moe_{match[1]}_{match[2]}" if match else "moe_" + module_name.replace(".", "_")


def _logged_sums(plans: Plans, like: Tensor) -> dict[str, Tensor]:
    """``label/figure`` -> sum. Layers that LayerDrop skips have keys too, since fairseq sums equal keys over ranks."""
    logged: dict[str, Tensor] = {}
    for module_name, layer_plans in plans.items():
        label = layer_label(module_name)
        logged.update({f"{label}/{figure}": like.new_zeros((), dtype=torch.float32) for figure in FIGURES})
        for plan in layer_plans:
            for figure, value in routing_sums(plan).items():
                logged[f"{label}/{figure}"] = logged[f"{label}/{figure}"] + value
    return logged


def _log_routing(logging_outputs: list[dict[str, Any]]) -> None:
    layers: dict[str, dict[str, float]] = {}
    for output in logging_outputs:
        for key, value in output.items():
            if key.startswith("moe_") and "/" in key:
                label, figure = key.split("/")
                sums = layers.setdefault(label, {})
                sums[figure] = sums.get(figure, 0.0) + float(value)
    for label, sums in layers.items():
        _log_figures(label, sums)
    if layers:
        _log_figures(
            "moe",
            {figure: sum(sums[figure] for sums in layers.values()) for figure in next(iter(layers.values()))},
        )


def _log_figures(label: str, sums: dict[str, float]) -> None:
    # fairseq shows smaller priorities first; figures of single layers come last
    priority = 300 if label == "moe" else 400
    for figure, value in routing_figures(sums).items():
        metrics.log_scalar(f"{label}_{figure}", value, weight=sums["tokens"], priority=priority, round=3)
