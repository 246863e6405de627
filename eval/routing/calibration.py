"""Search thresholds and a limit of experts per token that run a trained threshold router at a given cost or loss.

A setting is chosen on one text and then belongs to the model. Each token still takes as many experts as it needs, and
its experts depend on that token alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from eval.routing.corpus import Corpus
from eval.routing.forward_passes import evaluate, layer_settings
from eval.routing.layers import moe_layers
from eval.routing.masses import RouterMasses, solve
from eval.text.loading import Loaded

CLOSE = 0.005  # a measured cost within this share of the budget meets it and ends the search
ALLOWED = 0.02  # a measured cost farther than this share from the budget does not meet it
PASSES = 6  # passes over the text, to meet a budget with one limit


class Setting(NamedTuple):
    """Thresholds of the MoE layers in the model's order, and the most experts a token takes; None: no limit."""

    thresholds: tuple[float, ...]
    max_experts: int | None

    def as_settings(self) -> dict[str, float | list[float] | int | None]:
        """The ``moe_*`` settings of a model; one number if all layers have the same threshold."""
        same = len(set(self.thresholds)) == 1
        return {
            "moe_threshold": self.thresholds[0] if same else list(self.thresholds),
            "moe_max_experts": self.max_experts,
        }


@dataclass(frozen=True)
class Point:
    """A setting and its measurements.

    Attributes:
        loss_bits: mean cross entropy of a target token, without label smoothing.
        flops: counted FLOPs of the MoE layers relative to the dense FFN of the same layers.
        experts: experts per token, all layers.
        layers: label -> experts per token.
    """

    setting: Setting
    loss_bits: float
    flops: float
    experts: float
    layers: dict[str, float] = field(compare=False)


class NothingToCalibrateError(ValueError):
    """The model has no threshold router, or no setting is as cheap as the budget."""


class Calibration:
    """A search on one text; ``points`` holds every setting that was measured."""

    def __init__(self, loaded: Loaded, corpus: Corpus, *, max_tokens: int = 4096) -> None:
        self.loaded, self.corpus, self.max_tokens = loaded, corpus, max_tokens
        self.layers = moe_layers(loaded.model)
        configs = [layer.config for layer in self.layers.values()]
        if not configs or configs[0].router != "threshold" or configs[0].merge_experts:
            kind = f"moe_router {configs[0].router}" if configs else "no MoE layer"
            raise NothingToCalibrateError(
                f"{loaded.paths[0]} has {kind}: only moe_router threshold has a threshold to choose; a top_k or switch "
                "checkpoint also runs with --model-overrides \"{'moe_router': 'threshold'}\""
            )
        if configs[0].eval_capacity_factor is not None:
            raise ValueError(
                f"moe_eval_capacity_factor ({configs[0].eval_capacity_factor}) makes costs depend on the batch; "
                "set it to None"
            )
        self.num_experts = configs[0].num_experts
        self.points: list[Point] = []
        self.masses = RouterMasses(self.layers)
        own = Setting(tuple(config.threshold for config in configs), configs[0].max_experts)
        with self.masses.watching():
            self.before = self.measure(own)
        self.least = self.masses.flops([0.0] * len(configs), None)  # one expert a token

    def measure(self, setting: Setting) -> Point:
        """Measure loss and counted cost of a setting over the whole text."""
        known = next((point for point in self.points if point.setting == setting), None)
        if known is not None:
            return known
        changes = {
            name: {"threshold": threshold, "max_experts": setting.max_experts}
            for name, threshold in zip(self.layers, setting.thresholds, strict=True)
        }
        with layer_settings(self.loaded.model, changes):
            figures = evaluate(self.loaded, self.corpus, self.corpus.indices, max_tokens=self.max_tokens)
        experts = {label: layer["used"] for label, layer in figures["layers"].items()}
        point = Point(setting, figures["loss_bits"], figures["flops"], figures["used"], experts)
        self.points.append(point)
        return point

    def uniform(self, threshold: float, limit: int | None) -> Setting:
        """A setting with one threshold for all layers."""
        return Setting((threshold,) * len(self.layers), limit)

    def limits(self, experts: float) -> list[int | None]:
        """Limits to try if a token takes ``experts`` on average; None is no limit.

        The limit ``experts`` itself is left out, since every token would take as many, as in top-k routing.
        """
        steps = {math.ceil(factor * experts + 1e-9) for factor in (1.25, 2.0)}
        return [*sorted(step for step in steps if step < self.num_experts), None]

    def meet(self, budget: float) -> Point:
        """Find the best setting with one threshold that costs ``budget``.

        Args:
            budget: FLOPs of the MoE layers relative to the dense FFN.
        Raises: NothingToCalibrateError for a budget below one expert a token.
        """
        if not budget >= self.least * (1 - CLOSE):
            raise NothingToCalibrateError(
                f"--budget ({budget:g}) is less than one expert a token, {self.least:g} of the dense FLOPs, "
                "and a token takes at least one"
            )
        found = [self._meet(budget, limit) for limit in self.limits(budget / self.least)]
        met = [point for point in found if abs(point.flops / budget - 1) <= ALLOWED]
        within = [point for point in found if point.flops <= budget * (1 + ALLOWED)]
        return min(met or within or found, key=lambda point: (point.loss_bits, point.flops))

    def _meet(self, budget: float, limit: int | None) -> Point:
        """Meet ``budget`` with one limit: the threshold comes from the counted masses, corrected by measured costs."""
        aim, low, high, best = budget, 0.0, 1.0, None
        for _ in range(PASSES):
            threshold = self.masses.threshold_for(aim, limit)
            if best is not None and not low < threshold < high:
                threshold = (low + high) / 2
            point = self.measure(self.uniform(threshold, limit))
            if best is None or abs(point.flops - budget) < abs(best.flops - budget):
                best = point
            if abs(point.flops / budget - 1) <= CLOSE:
                break
            low, high = (threshold, high) if point.flops < budget else (low, threshold)
            if low >= 1.0 or high <= 0.0:
                break  # no other threshold changes the cost: the limit or one expert a token is reached
            aim *= budget / point.flops
        assert best is not None
        return best

    def refine(self, point: Point, budget: float, rounds: int = 4) -> Point:
        """Give each layer its own threshold, by moving experts at the same ``budget`` to the layers that gain most."""
        if len(self.layers) < 2:
            return point
        start = point
        worth = {name: self._worth(point, name) for name in self.layers}
        order = sorted(self.layers, key=lambda name: worth[name])
        for giver, taker in list(zip(order, reversed(order), strict=True))[: min(rounds, len(order) // 2)]:
            moved = self._settled(self._moved(point, giver, taker), budget)
            if worth[giver] < worth[taker] and moved.loss_bits < point.loss_bits:
                point = moved
        return point if point.flops <= max(start.flops, budget * (1 + CLOSE)) else start

    def _settled(self, point: Point, budget: float) -> Point:
        """Scale the experts beyond the first of all layers until the cost is ``budget`` again."""
        for _ in range(3):
            if abs(point.flops / budget - 1) <= CLOSE or point.flops <= self.least:
                break
            factor = max((budget - self.least) / (point.flops - self.least), 0.0)
            point = self.measure(self._scaled(point.setting, factor, list(self.layers)))
        return point

    def _scaled(self, setting: Setting, factor: float, names: Sequence[str]) -> Setting:
        """Multiply the expected experts of some layers beyond the first by ``factor``."""
        thresholds = dict(zip(self.layers, setting.thresholds, strict=True))
        for name in names:
            further = self.masses.experts(name, thresholds[name], setting.max_experts) - 1
            thresholds[name] = self.masses.layer_threshold_for(name, 1 + further * factor, setting.max_experts)
        return Setting(tuple(thresholds.values()), setting.max_experts)

    def _worth(self, point: Point, name: str) -> float:
        """Bits lost for each unit of FLOPs saved if a layer gives up a third of its experts beyond the first."""
        less = self.measure(self._scaled(point.setting, 2 / 3, [name]))
        saved = point.flops - less.flops
        return (less.loss_bits - point.loss_bits) / saved if saved > 1e-6 else math.inf

    def _moved(self, point: Point, giver: str, taker: str) -> Point:
        """Move a third of the experts that ``giver`` takes beyond the first to ``taker``."""
        cut = self._scaled(point.setting, 2 / 3, [giver])
        limit, place = cut.max_experts, list(self.layers).index(taker)

        def grown(threshold: float) -> tuple[float, ...]:
            return (*cut.thresholds[:place], threshold, *cut.thresholds[place + 1 :])

        spent = self.masses.flops(point.setting.thresholds, limit)
        threshold = solve(lambda t: self.masses.flops(grown(t), limit), spent)
        return self.measure(Setting(grown(threshold), limit))

    def cheapest(self, tolerance: float) -> Point:
        """Find the cheapest setting with one threshold whose loss is at most ``tolerance`` bits above the model's own.

        Raises: ValueError for a tolerance that is negative or no number.
        """
        if not tolerance >= 0:
            raise ValueError(f"--max-loss ({tolerance}) must be at least 0 bits")
        allowed = self.before.loss_bits + tolerance
        one = self.measure(self.uniform(0.0, None))
        if one.loss_bits <= allowed:
            return one
        best = self.before
        for limit in self.limits(2):
            best = min(best, self._cheapest(allowed, limit, one.flops, best.flops), key=lambda point: point.flops)
        return best

    def shrink(self, point: Point, tolerance: float) -> Point:
        """Cut all layers' experts beyond the first alike, for a loss within ``tolerance`` bits of the model's own."""
        low, high, best = 0.0, 1.0, point
        for _ in range(PASSES):
            factor = (low + high) / 2
            less = self.measure(self._scaled(point.setting, factor, list(self.layers)))
            if less.loss_bits <= self.before.loss_bits + tolerance:
                best, high = min(best, less, key=lambda each: each.flops), factor
            else:
                low = factor
        return best

    def _cheapest(self, allowed: float, limit: int | None, low: float, high: float) -> Point:
        """Bisect the expected cost between ``low``, which loses too much, and ``high``."""
        found = self.before
        for _ in range(PASSES):
            middle = math.sqrt(low * high)
            point = self.measure(self.uniform(self.masses.threshold_for(middle, limit), limit))
            if point.loss_bits <= allowed:
                found, high = min(found, point, key=lambda each: each.flops), middle
            else:
                low = middle
            if high / low < 1 + CLOSE:
                break
        return found
