"""Run forward passes over a test set, for the loss of a plain validation and the plans of every MoE layer."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from eval.routing import tokens
from eval.routing.activations import InsideLayers
from eval.routing.corpus import Corpus, input_tokens
from eval.routing.layers import moe_layers
from eval.routing.sums import AgreementSums, LayerSums
from eval.text.loading import Loaded
from xmoe_fairseq.criterions.load_balance import layer_label
from xmoe_fairseq.moe import RoutingPlan, record_plans
from xmoe_fairseq.moe.statistics import routing_figures, routing_sums

INSIDE_BATCHES = 16  # batches, evenly spread, from which hidden units are sampled


def short_label(module_name: str) -> str:
    """``encoder.layers.1.moe`` -> ``encoder 1``, as report.md names layers."""
    return layer_label(module_name).removeprefix("moe_").replace("_", " ")


@contextmanager
def routing_settings(model: nn.Module, **changes: Any) -> Iterator[None]:
    """Run the block with other settings in every MoE layer, e.g. ``threshold=0.7`` or ``eval_capacity_factor=1.0``.

    Raises: ValueError as MoEConfig for a value that is not allowed.
    """
    with layer_settings(model, dict.fromkeys(moe_layers(model), changes)):
        yield


@contextmanager
def layer_settings(model: nn.Module, changes: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Run the block with other settings in single MoE layers: module name -> changed fields of its MoEConfig.

    Raises: ValueError as MoEConfig for a value that is not allowed.
    """
    layers = moe_layers(model)
    holders = [
        [module for module in layers[name].modules() if getattr(module, "config", None) is layers[name].config]
        for name in changes
    ]
    before = [modules[0].config for modules in holders]
    after = [replace(config, **change) for config, change in zip(before, changes.values(), strict=True)]

    def install(configs: Iterable[Any]) -> None:
        for modules, config in zip(holders, configs, strict=True):
            for module in modules:
                module.config = config

    install(after)
    try:
        yield
    finally:
        install(before)


class Loss:
    """Cross entropy without label smoothing over real target tokens."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.tokens = 0

    def add(self, model: nn.Module, output: Any, sample: dict[str, Any], padding: int) -> None:
        """``output``: what the model returned for ``sample``."""
        log_prob = model.get_normalized_probs(output, log_probs=True)
        target = sample["target"]
        nll = -log_prob.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        real = target.ne(padding)
        self.nats += float(nll[real].double().sum())
        self.tokens += int(real.sum())

    def figures(self) -> dict[str, float]:
        """Loss in bits as fairseq logs it, perplexity, tokens."""
        nats = self.nats / max(self.tokens, 1)
        perplexity = math.exp(nats) if nats < 700 else math.inf
        return {"loss_bits": nats / math.log(2), "perplexity": perplexity, "target_tokens": self.tokens}


def count_tokens(loaded: Loaded, corpus: Corpus) -> dict[str, Tensor]:
    """Side -> int64 (V,): occurrences of each token among the routed ones. Reads every sentence once."""
    sides = ("encoder", "decoder") if loaded.is_translation else ("decoder",)
    keys = {"encoder": "source", "decoder": "target"} if loaded.is_translation else {"decoder": "source"}
    counts = {side: np.zeros(len(_dictionary(loaded, side)), dtype=np.int64) for side in sides}
    for index in corpus.indices:
        item = corpus.dataset[int(index)]
        for side in sides:
            np.add.at(counts[side], item[keys[side]].numpy(), 1)
    return {side: torch.from_numpy(count).to(loaded.device) for side, count in counts.items()}


def _dictionary(loaded: Loaded, side: str) -> Any:
    return loaded.task.source_dictionary if side == "encoder" else loaded.task.target_dictionary


class Observation:
    """The running sums of one pass over a test set."""

    def __init__(self, loaded: Loaded, corpus: Corpus) -> None:
        self.loaded = loaded
        self.layers = moe_layers(loaded.model)
        self.tables = {
            side: tokens.vocabulary(_dictionary(loaded, side), count)
            for side, count in count_tokens(loaded, corpus).items()
        }
        self.sums = {name: LayerSums(layer.config.num_experts, loaded.device) for name, layer in self.layers.items()}
        self.of_side = {side: [name for name in self.layers if self._side(name) == side] for side in self.tables}
        self.agreement = {
            side: AgreementSums([self.layers[name].config.num_experts for name in names], loaded.device)
            for side, names in self.of_side.items()
        }
        self.inside = InsideLayers(loaded.model)
        self.loss = Loss()
        self.tokens = dict.fromkeys(self.tables, 0)

    def _side(self, name: str) -> str:
        return "encoder" if short_label(name).startswith("encoder") else "decoder"

    @torch.no_grad()
    def add(self, sample: dict[str, Any], look_inside: bool) -> None:
        """Run and add one forward pass with teacher forcing; ``look_inside`` samples hidden units too."""
        loaded = self.loaded
        group_T = {side: tokens.groups(ids, self.tables[side]) for side, ids in input_tokens(sample).items()}
        real_T = {side: named["kind"] >= 0 for side, named in group_T.items()}
        with record_plans(loaded.model) as plans:
            if look_inside:
                with self.inside.watching(real_T):
                    output = loaded.model(**sample["net_input"])
            else:
                output = loaded.model(**sample["net_input"])
        self.loss.add(loaded.model, output, sample, loaded.task.target_dictionary.pad())
        for side, names in self.of_side.items():
            self.tokens[side] += int(real_T[side].sum())
            self._add_side(side, names, plans, group_T[side], real_T[side])

    def _add_side(self, side: str, names: list[str], plans: Any, group_T: Any, real_T: Tensor) -> None:
        used, first = [], []
        for name in names:
            for plan in plans[name]:
                used_T, first_T = self.sums[name].add(plan, group_T)
            used.append(used_T)
            first.append(first_T)
        if names:
            self.agreement[side].add(used, first, real_T)

    def figures(self) -> dict[str, Any]:
        """``quality``, ``layers``, ``dense_layers``, ``agreement``, ``tokens`` of the JSON."""
        layers = {}
        for name, layer in self.layers.items():
            config = layer.config
            layers[short_label(name)] = {
                "router": config.router,
                "num_experts": config.num_experts,
                "expert_dim": config.expert_dim,
                "dense_flops_per_token": 4 * config.embed_dim * (config.dense_dim or config.expert_dim),
                **self.sums[name].figures(self.tables[self._side(name)]),
                "positive_share": self.inside.positive_share(name),
                "similarity": self.inside.similarity(name),
            }
        dense = {name: self.inside.positive_share(name) for name in self.inside.dense}
        agreement = {
            side: sums.figures([short_label(name) for name in self.of_side[side]])
            for side, sums in self.agreement.items()
            if len(self.of_side[side]) > 1
        }
        return {
            "quality": self.loss.figures(),
            "tokens": self.tokens,
            "layers": layers,
            "dense_layers": {short_label(name): share for name, share in dense.items() if share},
            "agreement": agreement,
        }


def observe(loaded: Loaded, corpus: Corpus, *, max_tokens: int, progress: bool = False) -> dict[str, Any]:
    """Make one pass over the whole corpus. Returns: its figures and seconds."""
    start = time.perf_counter()
    observation = Observation(loaded, corpus)
    batches = corpus.batches(corpus.indices, max_tokens)
    inside = set(np.linspace(0, len(batches) - 1, min(INSIDE_BATCHES, len(batches))).round().astype(int).tolist())
    with tqdm(total=len(corpus.indices), unit="sentence", desc="routing", disable=not progress) as bar:
        for number, sample in enumerate(corpus.samples(batches, loaded.device)):
            observation.add(sample, look_inside=number in inside)
            bar.update(len(batches[number]))
    return {**observation.figures(), "seconds": time.perf_counter() - start}


@torch.no_grad()
def evaluate(loaded: Loaded, corpus: Corpus, indices: np.ndarray, *, max_tokens: int) -> dict[str, Any]:
    """Measure loss and counted routing figures alone over some sentences, for a point of a sweep."""
    loss, sums = Loss(), defaultdict(dict)
    for sample in corpus.samples(corpus.batches(indices, max_tokens), loaded.device):
        with record_plans(loaded.model) as plans:
            output = loaded.model(**sample["net_input"])
        loss.add(loaded.model, output, sample, loaded.task.target_dictionary.pad())
        add_plans(sums, plans)
    return {"sentences": len(indices), **loss.figures(), **summed_figures(sums)}


def add_plans(sums: dict[str, dict[str, float]], plans: dict[str, list[RoutingPlan]]) -> None:
    """Add the routing sums of every plan under its layer's label."""
    for name, layer_plans in plans.items():
        layer = sums.setdefault(short_label(name), {})
        for plan in layer_plans:
            for figure, value in routing_sums(plan).items():
                layer[figure] = layer.get(figure, 0.0) + float(value)


def summed_figures(sums: dict[str, dict[str, float]]) -> dict[str, Any]:
    """``flops`` relative to dense FFNs in the same layers, ``used``, ``dropped``, and the same per layer."""
    kept = ("wanted", "used", "dropped", "flops", "load_cv", "entropy")
    layers = {name: routing_figures(layer) for name, layer in sums.items() if layer}
    if not layers:
        return {"flops": None, "used": None, "wanted": None, "dropped": None, "layers": {}}
    total: dict[str, float] = defaultdict(float)
    for layer in sums.values():
        for figure, value in layer.items():
            total[figure] += value
    overall = routing_figures(total)
    return {
        **{name: overall[name] for name in ("flops", "used", "wanted", "dropped")},
        "layers": {name: {key: figures[key] for key in kept} for name, figures in layers.items()},
    }
