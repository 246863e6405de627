"""Running sums over batches, which are all that an analysis keeps of a layer, whatever the length of the test set.

Axis letters: T tokens of a flattened batch, E experts, G groups of a grouping, A assignments of a plan, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eval.routing import tokens
from xmoe_fairseq.moe import RoutingPlan
from xmoe_fairseq.moe.statistics import routing_figures, routing_sums

_SIZES = {name: len(names) for name, names in tokens.GROUP_NAMES.items()} | {"token": tokens.NUM_COMMON + 1}
_IDLE_SHARE = 0.1  # of the even share; an expert with less is called nearly idle


class LayerSums:
    """Sums of one MoE layer: E * (E + 600) numbers, whatever the number of sentences."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.num_experts = num_experts
        self.scalars: dict[str, Tensor] = {}
        self.count_E, self.wanted_E = zeros(num_experts), zeros(num_experts)
        self.tokens_with_N = zeros(num_experts + 1)  # at N: tokens that N experts computed
        self.rows_GE = {name: zeros(size, num_experts) for name, size in _SIZES.items()}
        self.tokens_G = {name: zeros(size) for name, size in _SIZES.items()}
        self.together_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)

    def add(self, plan: RoutingPlan, group_T: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Add one forward pass.

        Args:
            plan: the plan that was computed.
            group_T: int64 (T,) per grouping, -1 at padding.
        Returns:
            int64 (T,) twice: experts that computed each token, and the expert of largest weight (-1 where none).
        """
        for name, value in routing_sums(plan).items():
            self.scalars[name] = self.scalars.get(name, 0) + value.double()
        self.count_E += plan.count_E
        self.wanted_E += plan.wanted_E
        used_T = plan.experts_per_token_T
        real_T = group_T["kind"] >= 0
        self.tokens_with_N += torch.bincount(used_T[real_T], minlength=self.num_experts + 1)
        self._add_groups(plan, group_T, real_T)
        kept_TE = torch.zeros(plan.num_tokens, self.num_experts, device=plan.weight_A.device)
        pairs = (plan.token_index_A, plan.expert_index_A)
        kept_TE[pairs] = 1.0
        self.together_EE += (kept_TE.t() @ kept_TE).double()
        # plus 1, so that a kept expert of weight 0 counts more than one that was not kept
        weight_TE = kept_TE.index_put_(pairs, plan.weight_A.detach().float() + 1.0)
        return used_T, weight_TE.argmax(dim=-1).masked_fill(used_T == 0, -1)

    def _add_groups(self, plan: RoutingPlan, group_T: dict[str, Tensor], real_T: Tensor) -> None:
        for name, size in _SIZES.items():
            key_A = group_T[name].index_select(0, plan.token_index_A) * self.num_experts + plan.expert_index_A
            rows = torch.bincount(key_A, minlength=size * self.num_experts)
            self.rows_GE[name] += rows.view(size, self.num_experts)
            self.tokens_G[name] += torch.bincount(group_T[name][real_T], minlength=size)

    def figures(self, table: tokens.Vocabulary) -> dict[str, Any]:
        """The layer's part of the JSON; see docs/reading-a-routing.md."""
        count = self.count_E.double()
        mean = count.mean().clamp(min=1e-9)
        real = int(self.tokens_with_N.sum())
        share = count / mean
        idle = [e for e, value in enumerate(share.tolist()) if 0 < value < _IDLE_SHARE]
        return {
            "tokens": real,
            **routing_figures({name: float(value) for name, value in self.scalars.items()}),
            "load_cv_total": float(count.std(correction=0) / mean),
            "rows": self.count_E.tolist(),
            "rows_wanted": self.wanted_E.tolist(),
            "dead_experts": [e for e, value in enumerate(self.count_E.tolist()) if value == 0],
            "nearly_idle_experts": idle,
            "tokens_by_experts_used": self.tokens_with_N.tolist(),
            "unserved": float(self.tokens_with_N[0]) / max(real, 1),
            "groups": {name: self._group(name) for name in tokens.GROUP_NAMES},
            "typical_tokens": self._typical_tokens(table),
            "co_selection": self._co_selection(),
        }

    def _group(self, name: str) -> dict[str, Any]:
        rows_GE, tokens_G = self.rows_GE[name], self.tokens_G[name]
        per_token = [
            rows / count if count else None
            for rows, count in zip(rows_GE.sum(dim=-1).tolist(), tokens_G.tolist(), strict=True)
        ]
        return {
            "names": list(tokens.GROUP_NAMES[name]),
            "tokens": tokens_G.tolist(),
            "experts_per_token": per_token,
            "rows": rows_GE.tolist(),
        }

    def _typical_tokens(self, table: tokens.Vocabulary, number: int = 6) -> list[list[Any]]:
        """For each expert the frequent tokens it serves most beyond its share: [token, rows, share of the token]."""
        rows = self.rows_GE["token"][: len(table.common_ids)].double()
        share = rows / rows.sum(dim=-1, keepdim=True).clamp(min=1)
        usual = (rows.sum(dim=0) / rows.sum().clamp(min=1)).clamp(min=1e-12)
        gain = rows * (share / usual).clamp(min=1e-12).log()
        best = gain.topk(min(number, gain.size(0)), dim=0).indices.t().tolist()
        return [
            [
                [table.symbols[table.common_ids[k]], int(rows[k, e]), round(float(share[k, e]), 4)]
                for k in chosen
                if gain[k, e] > 0
            ]
            for e, chosen in enumerate(best)
        ]

    def _co_selection(self) -> list[list[float]]:
        """(E, E): tokens that both experts served over tokens that either served (Jaccard); 0 for idle experts."""
        alone = self.together_EE.diagonal()
        either = alone.unsqueeze(0) + alone.unsqueeze(1) - self.together_EE
        return rounded(self.together_EE / either.clamp(min=1))


class AgreementSums:
    """Agreement of the layers of one stack in first choices and numbers of experts, for each pair of layers."""

    def __init__(self, num_experts: list[int], device: torch.device) -> None:
        self.num_experts = num_experts
        size = len(num_experts)
        self.joint = {
            (i, j): torch.zeros(num_experts[i] + 1, num_experts[j] + 1, dtype=torch.int64, device=device)
            for i in range(size)
            for j in range(i)
        }
        self.sum_L = torch.zeros(size, dtype=torch.float64, device=device)
        self.product_LL = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, used_LT: list[Tensor], first_LT: list[Tensor], real_T: Tensor) -> None:
        """Add one forward pass: experts used (T,) and first choice (T,) of each layer, -1 where none."""
        used = torch.stack([used[real_T] for used in used_LT]).double()
        self.sum_L += used.sum(dim=-1)
        self.product_LL += used @ used.t()
        self.tokens += used.size(-1)
        first = [first[real_T] + 1 for first in first_LT]
        for (i, j), table in self.joint.items():
            key = first[i] * table.size(1) + first[j]
            table += torch.bincount(key, minlength=table.numel()).view_as(table)

    def figures(self, names: list[str]) -> dict[str, Any]:
        """``first_choice``: normalised mutual information; ``experts_used``: correlation (None: constant)."""
        size = len(names)
        first = [[1.0 if i == j else 0.0 for j in range(size)] for i in range(size)]
        for (i, j), table in self.joint.items():
            first[i][j] = first[j][i] = normalised_mutual_information(table[1:, 1:].double())
        mean_L = self.sum_L / max(self.tokens, 1)
        covariance = self.product_LL / max(self.tokens, 1) - mean_L.unsqueeze(0) * mean_L.unsqueeze(1)
        spread = covariance.diagonal().clamp(min=0).sqrt()
        used = [
            [
                None if float(spread[i] * spread[j]) < 1e-9 else float(covariance[i, j] / (spread[i] * spread[j]))
                for j in range(size)
            ]
            for i in range(size)
        ]
        return {"layers": names, "first_choice": first, "experts_used": used}


def normalised_mutual_information(joint: Tensor) -> float | None:
    """Mutual information of a table of counts over the mean of its entropies, in [0, 1]; None if one is 0."""
    p = joint / joint.sum().clamp(min=1)
    rows, columns = p.sum(dim=1), p.sum(dim=0)
    entropies = [float(-torch.special.xlogy(q, q).sum()) for q in (rows, columns)]
    if min(entropies) <= 1e-12:
        return None
    both = float(-torch.special.xlogy(p, p).sum())
    return max(0.0, (sum(entropies) - both) / (sum(entropies) / 2))


def rounded(matrix: Tensor, digits: int = 3) -> list[list[float]]:
    """A matrix as lists of rounded numbers, short enough to embed."""
    return [[round(value, digits) for value in row] for row in matrix.tolist()]
