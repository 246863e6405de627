"""``--arch xmoe_transformer_as_official``: the official threshold layer with its own rules, for imported checkpoints.

It is for comparisons with published numbers, not for training. These rules differ from ``MoELayer``; all are tested
against recorded outputs of the official code (tests/checkpoints/test_import_official.py):

- Padding is routed, takes capacity and counts in T and in the balance loss.
- Capacity holds at inference too.
- Priority is K - (rank - 1) + p in float32, where rounding makes different probabilities equal. Equal priorities are
  served in the order of ``torch.topk``, which is arbitrary (on a CPU it is the same each time).
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models import register_model, register_model_architecture
from torch import Tensor

from ..models.architectures import WMT23
from ..models.translation import MoETransformerModel
from ..moe import MoELayer, RoutingPlan
from ..moe.balance import first_choice_terms
from ..moe.capacity import make_plan
from ..moe.plan import Choices
from ..moe_args import fill_moe_defaults

ARCH = "xmoe_transformer_as_official"
OLD_ARCH = "xmoe_transformer_as_released"  # the architecture's name in the last release, which checkpoints may hold


class OfficialMoELayer(MoELayer):
    """The official layer over this package's parameters; it uses ``x`` alone."""

    def forward(
        self, x: Tensor, padding: Tensor | None = None, token_ids: Tensor | None = None, context: Any = None
    ) -> tuple[Tensor, RoutingPlan]:
        """``x``: float (..., D), padding included. Returns ``y`` like ``x``, and the plan."""
        x_TD = x.reshape(-1, x.size(-1))
        with torch.autocast(x.device.type, enabled=False):
            prob_TE = (x_TD.float() @ self.router.weight.float().t()).softmax(dim=-1)
        sorted_TK, expert_TK, wanted_TK = wanted_experts(prob_TE.detach(), self.config.threshold)
        capacity = self.config.capacity(x_TD.size(0), self.training)
        choices = Choices(
            expert_TK=expert_TK,
            chosen_TK=serve(sorted_TK, expert_TK, wanted_TK, x_TD.size(0) if capacity is None else capacity),
            score_TK=sorted_TK,
            weight_TE=prob_TE,
            balance=first_choice_terms(prob_TE, expert_TK[:, 0], None),
            entropy=prob_TE.new_zeros(()),
        )
        num_tokens = torch.tensor(x_TD.size(0), device=x.device)
        plan = make_plan(choices, capacity=None, num_real_tokens=num_tokens, row_cost=self.config.row_cost)
        return self.experts(x_TD, plan).to(x.dtype).view(x.shape), plan


def wanted_experts(prob_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities from high to low, their experts, and bool: the float32 sum before is below ``threshold``."""
    sorted_TK, expert_TK = prob_TE.sort(dim=-1, descending=True)
    wanted_TK = sorted_TK.cumsum(dim=-1) - sorted_TK < threshold
    wanted_TK[:, :1] = True
    return sorted_TK, expert_TK, wanted_TK


def serve(sorted_TK: Tensor, expert_TK: Tensor, wanted_TK: Tensor, capacity: int) -> Tensor:
    """bool (T, K): the pairs that their expert serves, at most ``capacity`` each."""
    most = wanted_TK.sum(dim=-1).max().float()
    rank_K = torch.arange(sorted_TK.size(-1), dtype=torch.float32, device=sorted_TK.device)
    priority_TK = (most - rank_K + sorted_TK).masked_fill(~wanted_TK, -torch.inf)
    priority_TE = torch.empty_like(priority_TK).scatter_(1, expert_TK, priority_TK)
    served_CE = priority_TE.topk(capacity, dim=0).indices
    served_TE = torch.zeros_like(wanted_TK).scatter_(0, served_CE, True)
    return served_TE.gather(1, expert_TK) & wanted_TK


@register_model(OLD_ARCH)
@register_model(ARCH)
class OfficialTransformer(MoETransformerModel):
    """``xmoe_transformer`` whose MoE layers follow the official rules."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> OfficialTransformer:
        """Build as the parent class does. Raises: ValueError for a router other than threshold."""
        if args.moe_router != "threshold":
            raise ValueError(f"{ARCH} knows the threshold router, not {args.moe_router}; use xmoe_transformer")
        model = super().build_model(args, task)
        for layer in [*model.encoder.layers, *model.decoder.layers]:
            if hasattr(layer, "moe"):
                layer.moe = OfficialMoELayer(layer.moe.config)
        return model


@register_model_architecture(OLD_ARCH, OLD_ARCH)
@register_model_architecture(ARCH, ARCH)
def as_official(args: Any) -> None:
    """Give ``args`` the defaults of ``xmoe_transformer``; an imported checkpoint holds its own settings."""
    WMT23.apply(args)
    fill_moe_defaults(args)
