"""Balanced assignment of many tokens to few experts by an auction, on the device of the scores.

Tokens bid for experts, an expert keeps its best bids, and its price is the lowest of them. With each bid raised by
epsilon, the result is within N * epsilon of the largest possible sum of scores (Bertsekas and Castanon 1989, auctions
for transportation problems). Prices start near their optimum, from a few rounds of Sinkhorn's scaling, so that
some tens of rounds suffice; any start leaves the bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Epsilon over the standard deviation of the scores: what a token may lose, on average, against the optimum.
TOLERANCE = 2e-3
# Temperatures of the scaling over that deviation, and rounds of each.
_TEMPERATURES, _SCALINGS = (1.0, 0.3, 0.1, 0.03), 12
# Rounds between two checks whether a token is left; each check waits for the device.
_ROUNDS_BETWEEN_LOOKS = 8
# Many equal rows raise a price by epsilon at a time: after so many rounds epsilon doubles, every 64 rounds.
_PATIENT_ROUNDS, _ROUNDS_PER_DOUBLING = 512, 64
# Epsilon is far above any difference of scores by then; the tokens that are left take any free place.
MAX_ROUNDS = 2048


class Auctioned(NamedTuple):
    """``expert_N`` int64; rounds of bidding; the epsilon reached, in standard deviations of the scores."""

    expert_N: Tensor
    rounds: int
    epsilon: float


def auction_assignment(score_NE: Tensor, max_rounds: int = MAX_ROUNDS) -> Auctioned:
    """Give each expert floor(N / E) or ceil(N / E) tokens with nearly the largest sum of scores.

    The sum is within N * epsilon standard deviations of the best for the counts that were chosen. Epsilon is
    ``TOLERANCE``, more only where many tokens have equal scores. The N mod E experts with one token more are those of
    the highest starting prices.

    Args:
        score_NE: float, finite, N >= E >= 2.
        max_rounds: a multiple of 8; after them the tokens that are left fill the free places in order, and the bound
            on the loss is lost, not the balance.
    """
    num_tokens, num_experts = score_NE.shape
    score_NE = score_NE.double()
    score_NE = ((score_NE - score_NE.mean()) / score_NE.std().clamp(min=1e-300)).float()
    price_E = _starting_prices(score_NE)
    each, extra = divmod(num_tokens, num_experts)
    places_E = torch.full((num_experts,), each, device=score_NE.device)
    places_E[price_E.topk(extra).indices] += 1
    owner_N = torch.full((num_tokens,), num_experts, device=score_NE.device)
    bid_N = score_NE.new_zeros(num_tokens)
    epsilon = TOLERANCE
    for rounds in range(_ROUNDS_BETWEEN_LOOKS, max_rounds + 1, _ROUNDS_BETWEEN_LOOKS):
        for _ in range(_ROUNDS_BETWEEN_LOOKS):
            owner_N, bid_N, price_E = _bid(score_NE, places_E, owner_N, bid_N, price_E, epsilon)
        if not bool((owner_N == num_experts).any()):
            return Auctioned(owner_N, rounds, epsilon)
        if rounds >= _PATIENT_ROUNDS and rounds % _ROUNDS_PER_DOUBLING == 0:
            epsilon *= 2
    return Auctioned(_fill_places(owner_N, places_E), max_rounds, torch.inf)


def _starting_prices(score_NE: Tensor) -> Tensor:
    """float32 (E,): prices at which a softmax of ``score - price`` loads the experts nearly evenly."""
    num_tokens, num_experts = score_NE.shape
    price_E = score_NE.new_zeros(num_experts)
    for temperature in _TEMPERATURES:
        for _ in range(_SCALINGS):
            load_E = ((score_NE - price_E) / temperature).softmax(dim=1).sum(dim=0)
            price_E = price_E + temperature * (load_E.clamp(min=1e-6) * (num_experts / num_tokens)).log()
    return price_E


def _bid(
    score_NE: Tensor, places_E: Tensor, owner_N: Tensor, bid_N: Tensor, price_E: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One round: tokens without a place bid for their best expert, then each expert keeps its best bids."""
    num_tokens, num_experts = score_NE.shape
    value_NE = score_NE - price_E
    best_N, expert_N = value_NE.max(dim=1)
    second_N = value_NE.scatter(1, expert_N.unsqueeze(1), -torch.inf).amax(dim=1)
    is_free_N = owner_N == num_experts
    bid_N = torch.where(is_free_N, price_E[expert_N] + best_N - second_N + epsilon, bid_N)
    owner_N = torch.where(is_free_N, expert_N, owner_N)
    # by expert, the highest bid first; stable, so equal bids are served in the order of the tokens
    key_N, order_N = ((owner_N << 32) | _descending_bits(bid_N)).sort(stable=True)
    sorted_owner_N = key_N >> 32
    start_E = torch.searchsorted(sorted_owner_N, torch.arange(num_experts, device=owner_N.device))
    place_N = torch.arange(num_tokens, device=owner_N.device) - start_E[sorted_owner_N]
    keeps_N = place_N < places_E[sorted_owner_N]
    owner_N = owner_N.scatter(0, order_N, torch.where(keeps_N, sorted_owner_N, num_experts))
    # the price of a full expert is its lowest bid
    end_E = torch.cat([start_E[1:], start_E.new_full((1,), num_tokens)])
    last_E = (start_E + places_E - 1).clamp(max=num_tokens - 1)
    price_E = torch.where(end_E - start_E >= places_E, bid_N[order_N][last_E], price_E)
    return owner_N, bid_N, price_E


def _descending_bits(value: Tensor) -> Tensor:
    """int64 in [0, 2^32) that ascends as ``value`` (float32, of either sign) descends."""
    bits = value.view(torch.int32).long()
    return 0x7FFFFFFF - torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _fill_places(owner_N: Tensor, places_E: Tensor) -> Tensor:
    """Tokens without a place take the free ones in order."""
    num_experts = places_E.numel()
    count_E = torch.bincount(owner_N, minlength=num_experts + 1)[:num_experts]
    free = torch.arange(num_experts, device=owner_N.device).repeat_interleave(places_E - count_E)
    owner_N = owner_N.clone()
    owner_N[owner_N == num_experts] = free
    return owner_N
