"""Routing figures for the log: pure functions of a plan, as sums that are added over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import RoutingPlan

# Keys of routing_sums.
FIGURES = ("tokens", "wanted", "used", "cost", "entropy", "forwards", "load_cv", "balance")


def routing_sums(plan: RoutingPlan) -> dict[str, Tensor]:
    """Sums of one forward pass of one layer, without gradient, without host synchronisation.

    Returns:
        float32 scalars: ``tokens`` (without padding), ``wanted`` and ``used`` (token, expert) pairs, ``cost`` (FLOPs of
        the used pairs in units of one token through the dense FFN), ``entropy`` (nats times tokens), and, once per
        forward pass, ``forwards`` (1), ``load_cv`` (standard deviation / mean of rows per expert) and ``balance``.
    """
    with torch.no_grad():
        tokens = plan.num_real_tokens.float()
        used_E = plan.count_E.float()
        used = used_E.sum()
        return {
            "tokens": tokens,
            "wanted": plan.wanted_E.sum().float(),
            "used": used,
            "cost": used * plan.row_cost,
            "entropy": plan.entropy * tokens,
            "forwards": torch.ones_like(tokens),
            "load_cv": used_E.std(correction=0) / used_E.mean().clamp(min=1e-9),
            "balance": plan.balance_loss.detach(),
        }


def routing_figures(sums: dict[str, float]) -> dict[str, float]:
    """The figures to show, from added ``routing_sums``.

    Returns:
        ``wanted`` and ``used`` experts per token, ``dropped`` share of the wanted pairs, ``load_cv``, ``entropy``
        (nats), ``balance`` (the loss, unweighted) and ``flops`` relative to the dense FFN.
    """
    tokens, forwards = max(sums["tokens"], 1.0), max(sums["forwards"], 1.0)
    return {
        "wanted": sums["wanted"] / tokens,
        "used": sums["used"] / tokens,
        "dropped": 1.0 - sums["used"] / sums["wanted"] if sums["wanted"] > 0 else 0.0,
        "load_cv": sums["load_cv"] / forwards,
        "entropy": sums["entropy"] / tokens,
        "balance": sums["balance"] / forwards,
        "flops": sums["cost"] / tokens,
    }
