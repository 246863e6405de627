"""The slow reference: every router, capacity, output and loss as loops that a reader can check by eye.

It imports nothing from the package. Probabilities are float64 and decisions are made on Python numbers, so that the
package's float32 arithmetic is compared with a more exact one. Letters: T tokens, E experts, G gates (E and null
experts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

Choice = list[int]  # the experts of one token, first choice first


@dataclass
class Routed:
    """What a slow router decided; ``weight_TE`` and ``balance`` carry gradient, float64."""

    choices: list[Choice]
    score_TE: list[list[float]]
    weight_TE: Tensor
    balance: Tensor


@dataclass
class SlowResult:
    """``pairs`` are the kept (expert, token), sorted."""

    y: Tensor
    pairs: list[tuple[int, int]]
    wanted: list[int]
    weight_TE: Tensor
    balance: Tensor


def probabilities(x_TD: Tensor, weight_GD: Tensor) -> Tensor:
    """Eq 1: softmax of the linear gate, float64 (T, G)."""
    return (x_TD.double() @ weight_GD.double().t()).softmax(dim=-1)


def by_probability(probs: list[float]) -> Choice:
    """Likeliest first; ties to the lower index."""
    return sorted(range(len(probs)), key=lambda expert: (-probs[expert], expert))


def choose_by_threshold(probs: list[float], threshold: float) -> Choice:
    """Eq 5: the fewest top experts whose exact sum reaches the threshold, at least one; 1 means every expert."""
    order = by_probability(probs)
    if threshold == 1:
        return order
    taken, mass = [], Fraction(0)
    for expert in order:
        taken.append(expert)
        mass += Fraction(probs[expert])
        if mass >= Fraction(threshold):
            break
    return taken


def choose_top_k(probs: list[float], k: int) -> Choice:
    return by_probability(probs)[:k]


def capacity_of(gamma: float | None, num_real: int, num_experts: int, min_capacity: int) -> int | None:
    """Eq 3 with the floor of the official code, never above the number of real tokens; gamma as it is written."""
    if gamma is None:
        return None
    return min(max(math.ceil(Fraction(str(gamma)) * num_real / num_experts), min_capacity), num_real)


def serve(choices: list[Choice], score_TE: list[list[float]], capacity: int | None) -> set[tuple[int, int]]:
    """Algorithm 1: pairs in order of priority p - i, that is by (i, -p), then token; each expert takes C pairs.

    Null experts (AdaMoE), whose numbers follow those of the true ones, take no rank.
    """
    true_choices = [
        [expert for expert in chosen if expert < len(score_TE[token])] for token, chosen in enumerate(choices)
    ]
    queue = [
        (rank, -score_TE[token][expert], token, expert)
        for token, chosen in enumerate(true_choices)
        for rank, expert in enumerate(chosen)
    ]
    room: dict[int, float] = {}
    kept = set()
    for _, _, token, expert in sorted(queue):
        left = room.get(expert, math.inf if capacity is None else capacity)
        if left >= 1:
            kept.add((token, expert))
        room[expert] = left - 1
    return kept


def balance_loss(choices: list[Choice], prob_TE: Tensor, real: list[int]) -> Tensor:
    """Eq 7: E * sum_i (share of real tokens whose first choice is i) * (mean probability of i)."""
    num_experts = prob_TE.size(1)
    total = prob_TE.new_zeros(())
    if not real:
        return total
    for expert in range(num_experts):
        share = sum(choices[token][0] == expert for token in real) / len(real)
        mean = sum(prob_TE[token, expert] for token in real) / len(real)
        total = total + num_experts * share * mean
    return total


def null_balance_loss(choices: list[Choice], prob_TG: Tensor, num_true: int, real: list[int]) -> Tensor:
    """AdaMoE's Eq 6 (alpha 1): all choices load their gate; the load of the nulls is spread evenly over them."""
    num_gates = prob_TG.size(1)
    total = prob_TG.new_zeros(())
    if not real:
        return total
    load = [sum(gate in choices[token] for token in real) / len(real) for gate in range(num_gates)]
    num_null = num_gates - num_true
    if num_null:
        load[num_true:] = [sum(load[num_true:]) / num_null] * num_null
    for gate in range(num_gates):
        total = total + num_gates * load[gate] * sum(prob_TG[token, gate] for token in real) / len(real)
    return total


def z_loss(logits_TG: Tensor, real: list[int]) -> Tensor:
    """Mean over real tokens of logsumexp(logits)^2."""
    total = logits_TG.new_zeros(())
    for token in real:
        total = total + logits_TG[token].exp().sum().log() ** 2
    return total / max(len(real), 1)


def hash_expert(token_id: int, seed: int, num_experts: int) -> int:
    """splitmix64 of token_id * golden ratio + seed, in unbounded integers; the top bit is not used."""
    full = 2**64 - 1
    mixed = (token_id * 0x9E3779B97F4A7C15 + seed) & full
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & full
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & full
    mixed ^= mixed >> 31
    return (mixed & (2**63 - 1)) % num_experts


def best_balanced_assignment(score_NE: np.ndarray) -> list[int]:
    """The best assignment that gives each expert floor(N / E) or ceil(N / E) tokens, as a linear programme."""
    num_tokens, num_experts = score_NE.shape
    if num_tokens == 0:
        return []
    one_expert = np.kron(np.eye(num_tokens), np.ones(num_experts))
    load = np.kron(np.ones(num_tokens), np.eye(num_experts))
    most = np.full(num_experts, math.ceil(num_tokens / num_experts))
    least = np.full(num_experts, num_tokens // num_experts)
    solved = linprog(
        -score_NE.ravel(),
        A_ub=np.concatenate([load, -load]),
        b_ub=np.concatenate([most, -least]),
        A_eq=one_expert,
        b_eq=np.ones(num_tokens),
        bounds=(0, 1),
    )
    return solved.x.reshape(num_tokens, num_experts).argmax(axis=1).tolist()


def normalized(weight_TE: Tensor, choices: list[Choice]) -> Tensor:
    """Each token's weights divided by their sum over its chosen (true) experts; 0 elsewhere."""
    rows = []
    for weights, chosen in zip(weight_TE, choices, strict=True):
        true = [expert for expert in chosen if expert < weight_TE.size(1)]
        mass = sum(weights[expert] for expert in true)
        row = [weights[e] / mass if e in true else weights[e] * 0 for e in range(weight_TE.size(1))]
        rows.append(torch.stack(row))
    return torch.stack(rows) if rows else weight_TE


def route(
    router: str,
    x_TD: Tensor,
    gate_GD: Tensor | None,
    real: list[int],
    *,
    num_experts: int,
    threshold: float = 0.9,
    top_k: int | None = None,
    normalize: bool = False,
    token_ids: list[int] | None = None,
    hash_seed: int = 1,
    training: bool = True,
) -> Routed:
    """What each token wants; tokens outside ``real`` want nothing."""
    num_tokens = x_TD.size(0)
    choices: list[Choice] = [[] for _ in range(num_tokens)]
    if router == "hash":
        assert token_ids is not None
        for token in real:
            choices[token] = [hash_expert(token_ids[token], hash_seed, num_experts)]
        one_TE = torch.ones(num_tokens, num_experts, dtype=torch.float64)
        return Routed(choices, one_TE.tolist(), one_TE, torch.zeros((), dtype=torch.float64))
    assert gate_GD is not None
    if router == "base":
        score_TE = x_TD.double() @ gate_GD.double().t()
        if training:
            best = best_balanced_assignment(score_TE[real].detach().numpy())
            for token, expert in zip(real, best, strict=True):
                choices[token] = [expert]
        else:
            for token in real:
                choices[token] = by_probability(score_TE[token].tolist())[:1]
        gate_TE = score_TE.sigmoid()
        return Routed(choices, gate_TE.tolist(), gate_TE, torch.zeros((), dtype=torch.float64))
    prob_TG = probabilities(x_TD, gate_GD)
    for token in real:
        probs = prob_TG[token].tolist()
        choices[token] = (
            choose_by_threshold(probs, threshold) if router == "threshold" else choose_top_k(probs, top_k or 1)
        )
    weight_TE = prob_TG[:, :num_experts]
    score_TE = weight_TE.tolist()
    if router == "adamoe":
        balance = null_balance_loss(choices, prob_TG, num_experts, real)
    else:
        balance = balance_loss(choices, prob_TG, real)
    if normalize or router == "adamoe":
        weight_TE = normalized(weight_TE, choices)
    return Routed(choices, score_TE, weight_TE, balance)


def expert_output(x_D: Tensor, experts: dict[str, Tensor], expert: int, activation: str) -> Tensor:
    """``activation(x @ w1[e] + b1[e]) @ w2[e] + b2[e]``, float64."""
    w1, b1, w2, b2 = (experts[name][expert].double() for name in ("w1", "b1", "w2", "b2"))
    function = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[activation]
    return function(x_D.double() @ w1 + b1) @ w2 + b2


def moe_layer(
    x_TD: Tensor,
    padding: list[bool],
    experts: dict[str, Tensor],
    routed: Routed,
    *,
    capacity: int | None,
    activation: str = "gelu",
) -> SlowResult:
    """Eq 2 over the pairs that Algorithm 1 keeps; 0 for tokens without a kept pair."""
    num_experts = experts["w1"].size(0)
    kept = serve(routed.choices, routed.score_TE, capacity)
    rows = []
    for token in range(x_TD.size(0)):
        row = torch.zeros(x_TD.size(1), dtype=torch.float64)
        for expert in range(num_experts):
            if (token, expert) in kept:
                assert not padding[token]
                row = row + routed.weight_TE[token, expert] * expert_output(x_TD[token], experts, expert, activation)
        rows.append(row)
    y = torch.stack(rows) if rows else x_TD.double() * 0
    wanted = [sum(expert in chosen for chosen in routed.choices) for expert in range(num_experts)]
    pairs = sorted((expert, token) for token, expert in kept)
    return SlowResult(y, pairs, wanted, routed.weight_TE, routed.balance)
