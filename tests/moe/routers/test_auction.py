"""The auction against the exact assignment: balance always, and the sum of scores within its tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xmoe_fairseq.moe.routers.auction import TOLERANCE, auction_assignment
from xmoe_fairseq.moe.routers.base_layers import exact_assignment


def scores(kind: str, num_tokens: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "sentences":  # neighbours are alike
        sentence = randn(num_tokens // 32 + 1, 16).repeat_interleave(32, dim=0)[:num_tokens]
        return (sentence + 0.3 * randn(num_tokens, 16)) @ randn(16, num_experts)
    if kind == "skewed":  # all tokens prefer the same few experts
        return randn(num_tokens, num_experts) + 3 * randn(num_experts)
    if kind == "words":  # few different rows, many times each
        return randn(20, num_experts)[torch.randint(20, (num_tokens,), generator=generator)]
    return randn(num_tokens, num_experts) * {"small": 1e-4, "large": 1e20}.get(kind, 1.0)


KINDS = ("random", "sentences", "skewed", "words", "small", "large")


def counts_differ_by_one(expert_N: Tensor, num_experts: int) -> bool:
    counts = torch.bincount(expert_N, minlength=num_experts)
    return len(counts) == num_experts and int(counts.max() - counts.min()) <= 1


def total(score_NE: Tensor, expert_N: Tensor) -> float:
    return float(score_NE.double().gather(1, expert_N.unsqueeze(1)).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(320, 16), (333, 16), (70, 33)])
def test_the_sum_is_within_tolerance_of_the_exact_optimum(kind: str, num_tokens: int, num_experts: int) -> None:
    score = scores(kind, num_tokens, num_experts)
    expert_N, rounds, epsilon = auction_assignment(score)
    assert counts_differ_by_one(expert_N, num_experts)
    assert rounds < 1100
    assert epsilon == TOLERANCE or kind == "words"
    best = total(score, torch.from_numpy(exact_assignment(score.double().numpy())))
    loss = (best - total(score, expert_N)) / float(score.double().std())
    assert loss <= num_tokens * min(epsilon, 1e-2)


def test_a_whole_batch_beats_blocks_of_it() -> None:
    """What blocks of 1024 tokens lose where neighbours are alike, which tokens of a sentence are."""
    score = scores("sentences", 2048, 32)
    blocks = torch.cat([torch.from_numpy(exact_assignment(half.double().numpy())) for half in score.split(256)])
    whole, rounds, epsilon = auction_assignment(score)
    assert (rounds < 512, epsilon) == (True, TOLERANCE)
    assert total(score, whole) > 1.02 * total(score, blocks)


def test_equal_scores_are_dealt_out() -> None:
    assert counts_differ_by_one(auction_assignment(torch.zeros(100, 8)).expert_N, 8)


def test_out_of_rounds_it_is_still_balanced() -> None:
    score = scores("skewed", 333, 16)
    expert_N, rounds, epsilon = auction_assignment(score, max_rounds=8)
    assert (rounds, epsilon) == (8, torch.inf)
    assert counts_differ_by_one(expert_N, 16)


def test_the_same_scores_give_the_same_assignment() -> None:
    score = scores("words", 500, 16)
    assert torch.equal(auction_assignment(score).expert_N, auction_assignment(score.clone()).expert_N)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_reaches_the_same_optimum(kind: str) -> None:
    score = scores(kind, 1100, 32)
    expert_N = auction_assignment(score.cuda()).expert_N.cpu()
    assert counts_differ_by_one(expert_N, 32)
    gap = total(score, auction_assignment(score).expert_N) - total(score, expert_N)
    assert abs(gap) <= 1100 * TOLERANCE * float(score.double().std())
