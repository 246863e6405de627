"""Exact orders, ties to the lower index."""

from __future__ import annotations

import pytest
import torch

from xmoe_fairseq.moe.ordering import count_indices, descending_key, flat_nonzero, sort_descending


@pytest.mark.parametrize("num_experts", [1, 2, 5, 64, 1000])
def test_sorts_by_value_then_index(num_experts: int) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    for prob_TE in (
        torch.rand(20, num_experts, generator=generator),
        torch.randint(0, 3, (20, num_experts), generator=generator) / 4,
        torch.zeros(3, num_experts),
        torch.rand(5, num_experts, generator=generator) * 1e-40,  # subnormal
    ):
        value_TE, index_TE = sort_descending(prob_TE)
        expected = torch.sort(prob_TE, dim=-1, descending=True, stable=True)
        assert torch.equal(index_TE, expected.indices)
        assert torch.equal(value_TE, expected.values)


def test_key_falls_as_the_score_rises() -> None:
    score = torch.tensor([0.0, 1e-45, 1e-38, 0.5, 0.50000006, 1.0, 3e38, float("inf")])
    key = descending_key(score)
    assert (key[1:] < key[:-1]).all()
    assert int(key.min()) >= 0


def test_not_contiguous_rows() -> None:
    prob_ET = torch.rand(5, 7)
    assert torch.equal(sort_descending(prob_ET.t())[1], prob_ET.t().argsort(descending=True, stable=True))


def test_counting_and_nonzero() -> None:
    index = torch.tensor([[3, 0], [3, 1]])
    assert count_indices(index, 5, torch.tensor([[True, True], [True, False]])).tolist() == [1, 0, 0, 2, 0]
    assert count_indices(index[:0], 2).tolist() == [0, 0]
    assert flat_nonzero(torch.tensor([[False, True], [True, False]])).tolist() == [1, 2]
    assert flat_nonzero(torch.zeros(0, 3, dtype=torch.bool)).tolist() == []
