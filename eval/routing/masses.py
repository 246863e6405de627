"""Estimate the cost of every threshold from one pass over the text, by counting cumulative router probabilities.

Axis letters: T tokens, E experts, B bins of probability mass in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xmoe_fairseq.moe import MoELayer

BINS = 4096


class RouterMasses:
    """Counts, per layer, how much probability each token's k likeliest experts have, k = 1 to E.

    A token takes one expert more for every k whose mass stays below the threshold, so these counts give the experts per
    token of each threshold and limit. They are right to the width of a bin for the first MoE layer, and nearly right
    for later ones, whose inputs change with the routing before them.
    """

    def __init__(self, layers: dict[str, MoELayer]) -> None:
        self.layers = layers
        self.counts = {
            name: torch.zeros(layer.config.num_experts, BINS, dtype=torch.int64) for name, layer in layers.items()
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the probabilities of every router while the block runs."""
        handles = [
            layer.router.register_forward_hook(partial(self._count, name)) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _count(self, name: str, router: Any, inputs: tuple[Tensor, Tensor | None, Any], _: Any) -> None:
        x_TD, real_T = inputs[:2]
        prob_TE = (x_TD.float() @ router.weight.float().t()).softmax(dim=-1)
        if real_T is not None:
            prob_TE = prob_TE[real_T]
        mass_TE = prob_TE.sort(dim=-1, descending=True).values.double().cumsum(dim=-1)
        bin_TE = (mass_TE * BINS).long().clamp(max=BINS - 1).cpu()
        for rank, bin_T in enumerate(bin_TE.unbind(dim=1)):
            self.counts[name][rank] += torch.bincount(bin_T, minlength=BINS)

    def tokens(self, name: str) -> int:
        """Tokens that the router of a layer routed."""
        return int(self.counts[name][0].sum())

    def experts(self, name: str, threshold: float, limit: int | None) -> float:
        """Expected experts per token of one layer at a threshold, at most ``limit``."""
        count_EB = self.counts[name]
        ranks = min(limit or len(count_EB), len(count_EB)) - 1
        if threshold >= 1.0:
            return 1.0 + ranks
        place = threshold * BINS
        whole = int(place)
        below = count_EB[:ranks, :whole].sum() + (place - whole) * count_EB[:ranks, whole].sum()
        return 1.0 + float(below) / max(self.tokens(name), 1)

    def flops(self, thresholds: Sequence[float], limit: int | None) -> float:
        """Expected FLOPs of all MoE layers, relative to the dense FFN, with one threshold for each layer."""
        total = cost = 0.0
        for (name, layer), threshold in zip(self.layers.items(), thresholds, strict=True):
            cost += self.tokens(name) * layer.config.row_cost * self.experts(name, threshold, limit)
            total += self.tokens(name)
        return cost / max(total, 1.0)

    def threshold_for(self, flops: float, limit: int | None) -> float:
        """The threshold for all layers that is expected to cost ``flops``; 0 or 1 if none does."""
        return solve(lambda t: self.flops([t] * len(self.layers), limit), flops)

    def layer_threshold_for(self, name: str, experts: float, limit: int | None) -> float:
        """The threshold at which a layer is expected to take ``experts`` a token."""
        return solve(lambda t: self.experts(name, t, limit), experts)


def solve(value: Callable[[float], float], wanted: float) -> float:
    """The place in [0, 1] where a rising function reaches ``wanted``, by bisection; 0 or 1 if it does not."""
    if value(0.0) >= wanted:
        return 0.0
    if value(1.0) <= wanted:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if value(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2
