"""Top-k routing; with k = 1 this is Switch (arXiv 2101.03961). Same parameters as the threshold router (3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import MoEConfig
from ..ordering import sort_descending
from ..plan import Choices
from .base import Router, probability_choices, rank_matrix, register_router


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
            score_TE = self.selection_score(prob_TG)
            expert_TK = sort_descending(score_TE)[1][:, : self.num_choices]
            rank_TE = rank_matrix(expert_TK, None, prob_TG.size(-1), real_T)
        normalize = self.config.normalize_weights
        return probability_choices(prob_TG, rank_TE, real_T, normalize=normalize, score_TE=score_TE)


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
