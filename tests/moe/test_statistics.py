"""Figures that are logged."""

from __future__ import annotations

import math

import pytest
import torch

from tests.moe.helpers import tiny_layer, tokens
from xmoe_fairseq.moe.statistics import routing_figures, routing_sums


def figures(*plans: object) -> dict[str, float]:
    sums: dict[str, float] = {}
    for plan in plans:
        for name, value in routing_sums(plan).items():  # type: ignore[arg-type]
            assert value.dtype == torch.float32
            assert not value.requires_grad
            sums[name] = sums.get(name, 0.0) + float(value)
    return routing_figures(sums)


def test_figures_of_an_even_router() -> None:
    layer = tiny_layer("top_k", top_k=2, capacity_factor=1.0, min_capacity=1, dense_dim=48)
    torch.nn.init.zeros_(layer.router.weight)
    padding = torch.tensor([False] * 12 + [True] * 3)
    _, plan = layer(tokens(15), padding)
    # ties: all 12 tokens want experts 0 and 1, each serves ceil(12 / 6) = 2
    shown = figures(plan)
    assert shown["wanted"] == 2
    assert shown["used"] == pytest.approx(4 / 12)
    assert shown["dropped"] == pytest.approx(20 / 24)
    assert shown["entropy"] == pytest.approx(math.log(6), rel=1e-5)
    assert shown["load_cv"] == pytest.approx(math.sqrt(2))  # 2, 2, 0, 0, 0, 0
    assert shown["balance"] == pytest.approx(1.0)  # f = (1, 0, ...), P = 1/6: 6 * 1/6
    assert shown["flops"] == pytest.approx(4 / 12 * 12 / 48)


def test_batches_are_weighted_by_their_tokens() -> None:
    layer = tiny_layer("threshold", capacity_factor=None)
    x = tokens(30)
    whole, first, second = (layer(part)[1] for part in (x, x[:10], x[10:]))
    together, apart = figures(whole), figures(first, second)
    for name in ("wanted", "used", "dropped", "entropy", "flops"):
        assert apart[name] == pytest.approx(together[name], rel=1e-5)


def test_no_tokens_give_zeros_not_nans() -> None:
    _, plan = tiny_layer()(tokens(3), torch.ones(3, dtype=torch.bool))
    assert set(figures(plan).values()) == {0.0}


def test_entropy_with_underflowing_probabilities_is_finite() -> None:
    layer = tiny_layer()
    with torch.no_grad():
        layer.router.weight.mul_(1e4)
    assert figures(layer(tokens(20))[1])["entropy"] == pytest.approx(0, abs=1e-2)
