"""Top-k routing; with k = 1 this is Switch (arXiv 2101.03961). Same parameters as the threshold router (3.5)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..config import MoEConfig
from ..ordering import sort_descending
from ..plan import Choices
from ..registry import register_router
from ..settings import Setting, at_least_one
from .router import KernelRule, Router, probability_choices

TOP_K = Setting(
    *("top_k", int, None, "experts a token takes (top_k, adamoe), or that are merged"),
    check=at_least_one,
    allowed="be at least 1, a whole number",
    optional=True,
    shown="k {}",
    ignored_elsewhere=True,
)
ROUTER_NOISE = Setting(
    *("router_noise", str, "none", "noise on the choosing logits in training; gaussian has standard deviation 1 / E"),
    choices=("none", "gumbel", "gaussian"),
)


@register_router("top_k")
class TopKRouter(Router):
    """The k likeliest experts of each token; weight = raw probability; Eq 7 balances first choices.

    ``router_noise`` disturbs, in training, the logits that choose; the weights stay those of the clean logits (gaussian
    as in arXiv 1701.06538).
    """

    settings: ClassVar[tuple[Setting, ...]] = (TOP_K, ROUTER_NOISE)

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        super().check(config)
        if config.top_k is None:
            raise ValueError(
                f"moe_router {config.router} needs moe_top_k, the number of experts a token takes; "
                "2 is usual, moe_router switch is top-1"
            )
        if config.top_k > cls.num_gates(config):
            raise ValueError(
                f"moe_top_k ({config.top_k}) must be between 1 and what there is to choose from, moe_num_experts "
                f"({config.num_experts}) + moe_null_experts ({cls.num_gates(config) - config.num_experts}); lower "
                "moe_top_k or raise one of these"
            )

    @classmethod
    def experts_wanted(cls, config: MoEConfig) -> float | None:
        return float(config.top_k)

    @property
    def num_choices(self) -> int:
        """Experts that a token takes, null experts counted."""
        return int(self.config.top_k)

    def kernel_rule(self) -> KernelRule | None:
        config = self.config
        if self.training and (config.input_jitter > 0 or config.router_noise != "none"):
            return None
        return KernelRule(None, self.num_choices, self.num_gates(config), normalize=config.normalize_weights)

    def choose(self, prob_TG: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        with torch.no_grad():
            score_TK, expert_TK = self.first_choices(prob_TG)
        normalize = self.config.normalize_weights
        return probability_choices(prob_TG, expert_TK, None, real_T, normalize=normalize, score_TK=score_TK)

    def first_choices(self, prob_TG: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (float32) and gates (int64) of the ``num_choices`` best of each token, best first."""
        score_TG, gate_TG = sort_descending(self._selection_score(prob_TG))
        return score_TG[:, : self.num_choices], gate_TG[:, : self.num_choices]

    def _selection_score(self, prob_TG: Tensor) -> Tensor:
        """Non-negative float32 score that orders the choices: the probability, with noise if training asks for it."""
        prob_TG = prob_TG.detach()
        noise = self.config.router_noise
        if not self.training or noise == "none":
            return prob_TG
        if noise == "gumbel":
            disturbance = -torch.empty_like(prob_TG).exponential_().log()
        else:
            disturbance = torch.randn_like(prob_TG) / prob_TG.size(-1)
        return (prob_TG.clamp(min=torch.finfo(torch.float32).tiny).log() + disturbance).softmax(dim=-1)


@register_router("switch")
class SwitchRouter(TopKRouter):
    """Top-1 (Switch Transformer)."""

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        super(TopKRouter, cls).check(config)  # without the checks of a k
        if config.top_k not in (None, 1):
            raise ValueError(
                f"moe_router switch takes one expert a token, moe_top_k is {config.top_k}; "
                "leave moe_top_k out or set moe_router top_k"
            )

    @classmethod
    def experts_wanted(cls, config: MoEConfig) -> float | None:
        return 1.0

    @property
    def num_choices(self) -> int:
        return 1
