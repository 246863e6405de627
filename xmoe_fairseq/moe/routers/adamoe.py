"""AdaMoE: top-k over true and null experts; a null expert computes nothing (arXiv 2406.13233)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..balance import null_averaged_terms
from ..config import MoEConfig
from ..plan import Choices
from ..registry import register_router
from ..settings import Setting, not_negative
from .router import KernelRule, probability_choices
from .top_k import TopKRouter


@register_router("adamoe")
class AdaMoERouter(TopKRouter):
    """Top-k over E experts and m null experts; weights are renormalised over a token's chosen true experts.

    Choices of null experts are removed before capacity. A token whose k choices are all null experts has output 0; with
    k > m there is none. State: ``weight`` (E + m, D), true experts first.
    """

    settings = (
        *TopKRouter.settings,
        Setting(
            *("num_null_experts", int, 0, "experts that compute nothing (adamoe)"),
            check=not_negative,
            allowed="not be negative; 0 turns it off",
            flat="moe_null_experts",
            shown="{} null experts",
        ),
    )

    @classmethod
    def num_gates(cls, config: MoEConfig) -> int:
        return config.num_experts + int(config.num_null_experts)

    @classmethod
    def experts_wanted(cls, config: MoEConfig) -> float | None:
        return float(config.top_k * config.num_experts / cls.num_gates(config))

    def kernel_rule(self) -> KernelRule | None:
        rule = super().kernel_rule()
        return None if rule is None else replace(rule, normalize=True, load_of_all=True)

    def choose(self, prob_TG: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        num_true = self.config.num_experts
        with torch.no_grad():
            score_TK, gate_TK = self.first_choices(prob_TG)
            place_TK = _true_before_null(gate_TK < num_true)
            ranked_TK = torch.empty_like(gate_TK).scatter(1, place_TK, gate_TK)
            score_TK = torch.empty_like(score_TK).scatter(1, place_TK, score_TK)
            is_true_TK = ranked_TK < num_true
        return probability_choices(
            prob_TG[:, :num_true],
            torch.where(is_true_TK, ranked_TK, 0),
            is_true_TK,
            real_T,
            normalize=True,
            score_TK=score_TK,
            balance=null_averaged_terms(prob_TG, gate_TK, num_true, real_T),
        )


def _true_before_null(is_true_TK: Tensor) -> Tensor:
    """int64: column of each choice when true experts come first, in their order, and null experts behind them.

    A rank is a place among the true choices: a token that chose a null expert first must not queue behind the second
    choices of the others.
    """
    true_so_far_TK = is_true_TK.cumsum(dim=1)
    null_so_far_TK = (~is_true_TK).cumsum(dim=1)
    return torch.where(is_true_TK, true_so_far_TK, true_so_far_TK[:, -1:] + null_so_far_TK) - 1
