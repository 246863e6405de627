"""The hash router: a fixed function of the token id."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.moe.helpers import EXPERTS, tiny_layer, tokens
from xmoe_fairseq.moe.routers.hashed import hash_experts


@pytest.mark.parametrize("seed", [0, 1, 12345, -7])
def test_equals_splitmix64_in_unbounded_integers(seed: int) -> None:
    ids = torch.cat([torch.arange(300), torch.tensor([2**31, 2**62, 999_999_937])])
    got = hash_experts(ids, torch.tensor(seed), 37)
    assert got.tolist() == [reference.hash_expert(token_id, seed, 37) for token_id in ids.tolist()]


@pytest.mark.parametrize("num_experts", [3, 32, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spreads_consecutive_ids_evenly(num_experts: int, seed: int) -> None:
    count = 32_000
    load = torch.bincount(hash_experts(torch.arange(count), torch.tensor(seed), num_experts), minlength=num_experts)
    expected = count / num_experts
    chi_square = float(((load - expected) ** 2 / expected).sum())
    degrees = num_experts - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_seeds_give_unrelated_hashes() -> None:
    ids = torch.arange(20_000)
    hashes = [hash_experts(ids, torch.tensor(seed), 16) for seed in (1, 2, 3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((hashes[a] == hashes[b]).float().mean()) - 1 / 16) < 0.01
    # nor is one seed's table another's, shifted
    for shift in range(1, 5):
        assert float((hashes[0][shift:] == hashes[1][:-shift]).float().mean()) < 0.1


def test_same_expert_on_every_call_position_and_batch_at_weight_1() -> None:
    layer = tiny_layer("hash", capacity_factor=None)
    ids = torch.tensor([5, 9, 5, 5, 7])
    _, plan = layer(tokens(5), None, ids)
    by_token = plan.expert_index_A[plan.token_index_A.argsort()]
    assert by_token[0] == by_token[2] == by_token[3]
    _, again = layer(tokens(3, seed=8), None, ids[2:])
    assert torch.equal(again.expert_index_A[again.token_index_A.argsort()], by_token[2:])
    assert torch.equal(plan.weight_A, torch.ones(5))
    assert plan.balance_loss.item() == 0


def test_the_seed_is_part_of_the_state() -> None:
    saved, loaded = tiny_layer("hash", hash_seed=5), tiny_layer("hash", hash_seed=6)
    loaded.load_state_dict(saved.state_dict())
    ids = torch.arange(100)
    plans = [layer(tokens(100), None, ids)[1] for layer in (saved, loaded)]
    assert torch.equal(plans[0].expert_index_A, plans[1].expert_index_A)
    assert len(set(plans[0].expert_index_A.tolist())) == EXPERTS


def test_missing_token_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moe_router hash .* got no token_ids; .* choose another moe_router"):
        tiny_layer("hash")(tokens(3))
