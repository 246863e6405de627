"""Top-k routing; with k = 1 this is Switch (arXiv 2101.03961). Same parameters as the threshold router (3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import MoEConfig
from ..ordering import sort_descending
from ..plan import Choices
from ..registry import register_router
from .router import Router, probability_choices


@register_router("top_k")
class TopKRouter(Router):
    """The k likeliest experts of each token; weight = raw probability; Eq 7 balances first choices."""

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        if config.top_k is None:
            raise ValueError(
                f"moe_router {config.router} needs moe_top_k, the number of experts a token takes; "
                "2 is usual, moe_router switch is top-1"
            )

    @property
    def num_choices(self) -> int:
        assert self.config.top_k is not None  # check() saw to it
        return self.config.top_k

    def choose(self, prob_TG: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        with torch.no_grad():
            score_TK, expert_TK = self.first_choices(prob_TG)
        normalize = self.config.normalize_weights
        return probability_choices(prob_TG, expert_TK, None, real_T, normalize=normalize, score_TK=score_TK)

    def first_choices(self, prob_TG: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (float32) and gates (int64) of the ``num_choices`` best of each token, best first."""
        score_TG, gate_TG = sort_descending(self.selection_score(prob_TG))
        return score_TG[:, : self.num_choices], gate_TG[:, : self.num_choices]


@register_router("switch")
class SwitchRouter(TopKRouter):
    """Top-1 (Switch Transformer)."""

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        if config.top_k not in (None, 1):
            raise ValueError(
                f"moe_router switch takes one expert a token, moe_top_k is {config.top_k}; "
                "leave moe_top_k out or set moe_router top_k"
            )

    @property
    def num_choices(self) -> int:
        return 1
