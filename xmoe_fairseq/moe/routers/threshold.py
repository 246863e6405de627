"""XMoE's router: each token takes as many experts as it needs to reach probability mass t (Eq 5, Algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import host
from ..config import MoEConfig
from ..ordering import sort_descending
from ..plan import Choices
from ..registry import register_router
from ..settings import Setting, at_least_one
from .router import KernelRule, Router, probability_choices

# Probabilities are summed as integers, in units of 2^-53.
_UNITS = 2**53


def count_to_reach(sorted_TE: Tensor, threshold: float) -> Tensor:
    """int64 (T,): the fewest leading experts whose probabilities sum to at least ``threshold``; at least one.

    Args:
        sorted_TE: float32 probabilities, descending.
        threshold: mass in [0, 1]; 1 means every expert, however the sum rounds.
    """
    num_tokens, num_experts = sorted_TE.shape
    if threshold >= 1.0:
        return torch.full((num_tokens,), num_experts, device=sorted_TE.device)
    # float32 sums would round the smallest probabilities away; integer sums are the same in any order
    mass_TE = (sorted_TE[:, :-1].double() * _UNITS).long().cumsum(dim=-1)
    return (mass_TE < math.ceil(threshold * _UNITS)).sum(dim=-1) + 1


@register_router("threshold")
class ThresholdRouter(Router):
    """Fewest top experts whose mass reaches ``threshold``; weight = raw probability; Eq 7 balances first choices.

    ``max_experts`` is a limit per token. Training under a tight capacity keeps about gamma experts of the many that a
    token may want. At inference, where nothing is dropped, the same limit gives sums of as many experts as in training,
    and unlike a capacity it does not depend on the batch.
    """

    settings = (
        Setting(
            *("threshold", float, 0.9, "probability mass in [0, 1] that a token's experts must reach (Eq 5)"),
            check=lambda mass: 0.0 <= mass <= 1.0,
            allowed="be a probability mass in [0, 1]; 0.9 is the paper's, 0 is top-1",
            shown="t {}",
            per_layer=True,
            ignored_elsewhere=True,
        ),
        Setting(
            *("max_experts", int, None, "most experts a token takes under the threshold router; none: no limit"),
            check=at_least_one,
            allowed="be at least 1, a whole number; none sets no limit",
            optional=True,
            shown="at most {} experts a token",
        ),
    )

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        super().check(config)
        if (config.max_experts or 1) > config.num_experts:
            raise ValueError(
                f"moe_max_experts ({config.max_experts}) must be between 1 and moe_num_experts ({config.num_experts}); "
                "None (on the command line: none) sets no limit"
            )

    @classmethod
    def experts_wanted(cls, config: MoEConfig) -> float | None:
        return float(config.num_experts) if config.threshold >= 1.0 else None

    def kernel_rule(self) -> KernelRule | None:
        if self.training and self.config.input_jitter > 0:
            return None
        config = self.config
        most = config.max_experts or config.num_experts
        return KernelRule(config.threshold, most, config.num_experts, normalize=config.normalize_weights)

    def choose(self, prob_TG: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        with torch.no_grad():
            sorted_TE, expert_TE = sort_descending(prob_TG.detach())
            count_T = count_to_reach(sorted_TE, self.config.threshold)
            if self.config.max_experts is not None:
                count_T = count_T.clamp(max=self.config.max_experts)
            longest = int(count_T.max()) if count_T.numel() and host.on_cpu(count_T) else sorted_TE.size(-1)
            expert_TK, score_TK = expert_TE[:, :longest], sorted_TE[:, :longest]
            chosen_TK = torch.arange(longest, device=count_T.device) < count_T.unsqueeze(-1)
        normalize = self.config.normalize_weights
        return probability_choices(prob_TG, expert_TK, chosen_TK, real_T, normalize=normalize, score_TK=score_TK)
