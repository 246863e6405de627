"""BASE: the balanced assignment and its optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests import reference
from tests.moe.helpers import EXPERTS, tiny_layer, tokens
from xmoe_fairseq.moe.routers import base_layers
from xmoe_fairseq.moe.routers.base_layers import balanced_assignment


def best_sum(score: np.ndarray) -> float:
    """Brute force over every assignment whose counts differ by at most one."""
    num_tokens, num_experts = score.shape
    best = -np.inf
    for expert_N in itertools.product(range(num_experts), repeat=num_tokens):
        counts = [expert_N.count(expert) for expert in range(num_experts)]
        if max(counts) - min(counts) <= 1:
            best = max(best, sum(score[n, e] for n, e in enumerate(expert_N)))
    return best


@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(1, 3), (2, 3), (3, 3), (5, 3), (7, 3), (6, 4), (7, 2), (4, 1)]
)
def test_reaches_the_brute_force_optimum(num_tokens: int, num_experts: int) -> None:
    for seed in range(3):
        score = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
        expert_N = balanced_assignment(score)
        total = sum(score[n, e].item() for n, e in enumerate(expert_N.tolist()))
        assert total == pytest.approx(best_sum(score.double().numpy()), rel=1e-6)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(50, 8), (61, 8), (97, 16)])
def test_reaches_the_optimum_of_the_linear_programme(num_tokens: int, num_experts: int) -> None:
    score = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(1))
    best = reference.best_balanced_assignment(score.double().numpy())
    assert balanced_assignment(score).tolist() == best


@pytest.mark.parametrize("num_experts", [1, 3, 8, 50])
def test_counts_differ_by_at_most_one_for_any_number_of_tokens(
    num_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_layers, "EXACT_TOKENS", 32)
    for num_tokens in (0, 1, 2, 7, 31, 32, 33, 64, 65, 100, 127):
        # scores that all favour one expert: only the balance pulls away
        score = torch.rand(num_tokens, num_experts) + 100 * (torch.arange(num_experts) == 0)
        counts = torch.bincount(balanced_assignment(score), minlength=num_experts)
        assert int(counts.sum()) == num_tokens
        assert int(counts.max() - counts.min()) <= 1


def test_more_than_1024_tokens_stay_balanced_and_near_the_optimum() -> None:
    score = torch.randn(1100, 8, generator=torch.Generator().manual_seed(1))
    expert_N = balanced_assignment(score)
    counts = torch.bincount(expert_N, minlength=8)
    assert int(counts.max() - counts.min()) <= 1
    best = score.gather(1, torch.from_numpy(base_layers.exact_assignment(score.double().numpy())).unsqueeze(1)).sum()
    assert float(best - score.gather(1, expert_N.unsqueeze(1)).sum()) <= 1100 * 1e-4


def test_equal_scores_and_huge_scores_stay_balanced() -> None:
    for score in (torch.zeros(22, 5), torch.randn(22, 5) * 1e30):
        counts = torch.bincount(balanced_assignment(score), minlength=5)
        assert sorted(counts.tolist()) == [4, 4, 4, 5, 5]


def test_training_is_balanced_and_inference_greedy() -> None:
    layer = tiny_layer("base", capacity_factor=None)
    x = tokens(45)
    padding = torch.arange(45) % 9 == 0
    _, plan = layer(x, padding)
    assert sorted(plan.count_E.tolist()) == [6, 6, 7, 7, 7, 7]
    _, plan = layer.eval()(x, padding)
    score = x @ layer.router.weight.t()
    expert_T = torch.full((45,), -1)
    expert_T[plan.token_index_A] = plan.expert_index_A
    assert torch.equal(expert_T, torch.where(padding, -1, score.argmax(1)))
    assert torch.allclose(plan.weight_A, score.max(1).values[plan.token_index_A].sigmoid())
    assert plan.balance_loss.item() == 0


def test_expert_vectors_start_nearly_orthogonal() -> None:
    weight = base_layers.BaseLayersRouter(tiny_layer("base").config).weight.detach()
    assert torch.allclose(weight @ weight.t(), 0.01 * torch.eye(EXPERTS), atol=1e-6)


def test_a_nan_reaches_the_output_where_training_finds_it() -> None:
    layer = tiny_layer("base", capacity_factor=None)
    x = tokens(9)
    x[4, 0] = float("nan")
    y, plan = layer(x)
    assert y[4].isnan().all()
    assert torch.isfinite(y[:4]).all()
    assert sorted(plan.count_E.tolist()) == [1, 1, 1, 2, 2, 2]
