"""From logits to decisions: probabilities, exact ranks, the choice by threshold or k, and their gradient.

A token's gates are sorted by one integer key each, (2^31 - 1 - bits of the probability, index): ties are exact and
the order is that of ordering.py. The mass ahead of a gate is the sum of the probabilities ahead of it in integer
units of 2^-53, the same in any order (routers/threshold.py).

Matrices that later kernels read by expert are stored gate by gate: (G, T).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gate import is_real_token

LEAST_MASS = tl.constexpr(1e-30)  # as in routers/router.py


@triton.jit
def order_gates(
    logit, gate, is_gate, is_token, is_real, threshold_units, most,
    BY_THRESHOLD: tl.constexpr, GATE_BITS: tl.constexpr,
):  # fmt: skip
    """Probabilities of a tile of tokens, and their gates in order.

    Args:
        logit: (BLOCK_T, BLOCK_G), -inf where there is no gate.
    Returns:
        prob, by gate, 0 beyond the batch; log_mass and entropy of each token, not masked; key, by gate.
        sorted_key, sorted_prob, chosen: in the order of the keys; the chosen places come first.
    """
    # a row beyond the batch may be all -inf; a finite maximum keeps NaN out of it
    row_max = tl.where(is_token, tl.max(logit, axis=1), 0.0)
    unscaled = tl.exp(logit - row_max[:, None])
    mass = tl.sum(unscaled, axis=1)
    prob = tl.where(is_token[:, None], unscaled / mass[:, None], 0.0)
    log_mass = row_max + tl.log(mass)
    # a gate of probability 0 may have the logit -inf
    entropy = log_mass - tl.sum(tl.where(prob > 0.0, prob * logit, 0.0), axis=1)
    # a NaN is ordered as 0, so that each rank occurs once and no list overflows; its weight stays NaN and shows in the
    # loss
    bits = tl.where(prob == prob, prob, 0.0).to(tl.int32, bitcast=True)
    key = ((2147483647 - bits).to(tl.int64) << GATE_BITS) | gate[None, :].to(tl.int64)
    key = tl.where(is_gate[None, :], key, 9223372036854775807)
    sorted_key = tl.sort(key, dim=1)
    place = gate[None, :]  # in the order of the keys: 0 is the likeliest gate
    sorted_bits = tl.where(is_gate[None, :], 2147483647 - (sorted_key >> GATE_BITS).to(tl.int32), 0)
    sorted_prob = sorted_bits.to(tl.float32, bitcast=True)
    chosen = (place < most) & is_real[:, None] & is_gate[None, :]
    if BY_THRESHOLD:
        units = (sorted_prob.to(tl.float64) * 9007199254740992.0).to(tl.int64)
        ahead = tl.cumsum(units, axis=1) - units
        chosen = chosen & ((ahead < threshold_units) | (place == 0))
    return prob, log_mass, entropy, key, sorted_key, sorted_prob, chosen


@triton.jit(do_not_specialize=["num_tokens", "threshold_units", "most"])
def route_forward(
    logits, padding, prob_GT, weight_ET, rank_GT, entropy_T, log_mass_T,
    num_tokens, num_gates, num_experts, threshold_units, most,
    BY_THRESHOLD: tl.constexpr, NORMALIZE: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_NULLS: tl.constexpr,
    GATE_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Decide for BLOCK_T tokens.

    Args:
        logits: float32 (T, G). padding: bool (T,), read if HAS_PADDING.
        prob_GT: float32 out; 0 at padding. weight_ET: float32 out if NORMALIZE.
        rank_GT: int32 out: place among the token's true experts (for a null gate: among all gates); -1 if not chosen.
        entropy_T, log_mass_T: float32 out; 0 at padding.
        threshold_units: int64, mass to reach in units of 2^-53; above 2^53 every gate is chosen (BY_THRESHOLD).
        most: most gates that a token takes.
    """
    # one function: every line works on the same tile, in registers
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    gate = tl.arange(0, BLOCK_G)
    is_token = token < num_tokens
    is_real = is_real_token(padding, token, is_token, HAS_PADDING)
    is_gate = gate < num_gates
    row = token.to(tl.int64)[:, None] * num_gates
    mask = is_token[:, None] & is_gate[None, :]
    logit = tl.load(logits + row + gate[None, :], mask=mask, other=-float("inf"))
    prob, log_mass, entropy, _, sorted_key, sorted_prob, chosen = order_gates(
        logit, gate, is_gate, is_token, is_real, threshold_units, most, BY_THRESHOLD, GATE_BITS
    )
    sorted_gate = (sorted_key & ((1 << GATE_BITS) - 1)).to(tl.int32)
    is_true = sorted_gate < num_experts
    rank = gate[None, :] + tl.zeros_like(sorted_gate)
    if HAS_NULLS:
        true_int = is_true.to(tl.int32)
        rank = tl.where(is_true, tl.cumsum(true_int, axis=1) - true_int, rank)
    sorted_at = sorted_gate.to(tl.int64) * num_tokens + token[:, None]
    tl.store(rank_GT + sorted_at, tl.where(chosen, rank, -1), mask=mask)
    where = gate.to(tl.int64)[None, :] * num_tokens + token[:, None]
    tl.store(prob_GT + where, tl.where(is_real[:, None], prob, 0.0), mask=mask)
    if NORMALIZE:
        chosen_mass = tl.sum(tl.where(chosen & is_true, sorted_prob, 0.0), axis=1)
        divisor = tl.where(chosen_mass > LEAST_MASS, chosen_mass, 1.0)
        tl.store(weight_ET + where, prob / divisor[:, None], mask=mask & (gate < num_experts)[None, :])
    tl.store(entropy_T + token, tl.where(is_real, entropy, 0.0), mask=is_token)
    tl.store(log_mass_T + token, tl.where(is_real, log_mass, 0.0), mask=is_token)


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward(
    prob_GT, rank_GT, slot_ET, padding, log_mass_T, grad_weight_R, grad_prob_sum_G, grad_square_sum, grad_logits,
    num_tokens, num_gates, num_experts,
    NORMALIZE: tl.constexpr, HAS_Z_LOSS: tl.constexpr, HAS_PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """grad_logits (T, G) from the gradients of the rows' weights, of the probability sums and of sum(log_mass^2)."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    gate = tl.arange(0, BLOCK_G)
    is_token = token < num_tokens
    is_real = is_real_token(padding, token, is_token, HAS_PADDING)
    is_gate = gate < num_gates
    is_true = gate < num_experts
    where = gate.to(tl.int64)[None, :] * num_tokens + token[:, None]
    mask = is_real[:, None] & is_gate[None, :]
    true_mask = is_real[:, None] & is_true[None, :]
    prob = tl.load(prob_GT + where, mask=mask, other=0.0)
    slot = tl.load(slot_ET + where, mask=true_mask, other=-1)
    grad = tl.load(grad_weight_R + slot, mask=slot >= 0, other=0.0)
    if NORMALIZE:
        chosen = tl.load(rank_GT + where, mask=true_mask, other=-1) >= 0
        chosen_mass = tl.sum(tl.where(chosen, prob, 0.0), axis=1)
        is_normal = chosen_mass > LEAST_MASS
        divisor = tl.where(is_normal, chosen_mass, 1.0)
        pull = tl.where(is_normal, tl.sum(grad * prob, axis=1) / (divisor * divisor), 0.0)
        grad = grad / divisor[:, None] - tl.where(chosen, pull[:, None], 0.0)
    grad += tl.load(grad_prob_sum_G + gate, mask=is_gate, other=0.0)[None, :]
    grad_logit = prob * (grad - tl.sum(prob * grad, axis=1)[:, None])
    if HAS_Z_LOSS:
        log_mass = tl.load(log_mass_T + token, mask=is_token, other=0.0)
        grad_logit += prob * (2.0 * tl.load(grad_square_sum) * log_mass)[:, None]
    row = token.to(tl.int64)[:, None] * num_gates + gate[None, :]
    tl.store(grad_logits + row, tl.where(mask, grad_logit, 0.0), mask=is_token[:, None] & is_gate[None, :])
