"""``--arch xmoe_transformer_as_released``: the released threshold layer with its own rules, for imported checkpoints.

For comparisons with published numbers, not for training. Rules that differ from ``MoELayer`` (all measured against
recorded outputs of the released code, tests/checkpoints/test_import_official.py):

- padding is routed, takes capacity and counts in T and in the balance loss;
- capacity holds at inference too;
- priority is K - (rank - 1) + p in float32, where rounding makes different probabilities equal; equals are served in
  the order of ``torch.topk``, which is arbitrary (on a CPU it is the same each time).
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models import register_model, register_model_architecture
from torch import Tensor

from ..models.architectures import WMT23
from ..models.moe_args import fill_moe_defaults
from ..models.translation import MoETransformerModel
from ..moe import MoELayer, RoutingPlan
from ..moe.balance import first_choice_terms
from ..moe.capacity import make_plan
from ..moe.plan import UNWANTED, Choices

ARCH = "xmoe_transformer_as_released"


class ReleasedMoELayer(MoELayer):
    """The released layer over this package's parameters; it looks at ``x`` alone."""

    def forward(
        self, x: Tensor, padding: Tensor | None = None, token_ids: Tensor | None = None, context: Any = None
    ) -> tuple[Tensor, RoutingPlan]:
        """``x``: float (..., D), padding included. Returns ``y`` like ``x``, and the plan."""
        x_TD = x.reshape(-1, x.size(-1))
        with torch.autocast(x.device.type, enabled=False):
            prob_TE = (x_TD.float() @ self.router.weight.float().t()).softmax(dim=-1)
        rank_TE = wanted_ranks(prob_TE.detach(), self.config.threshold)
        capacity = self.config.capacity(x_TD.size(0), self.training)
        kept_TE = serve(prob_TE.detach(), rank_TE, x_TD.size(0) if capacity is None else capacity)
        choices = Choices(
            rank_TE=rank_TE.masked_fill(~kept_TE, UNWANTED),
            score_TE=prob_TE.detach(),
            weight_TE=prob_TE,
            balance=first_choice_terms(prob_TE, rank_TE, None),
            entropy=prob_TE.new_zeros(()),
        )
        num_tokens = torch.tensor(x_TD.size(0), device=x.device)
        plan = make_plan(choices, capacity=None, num_real_tokens=num_tokens, row_cost=self.config.row_cost)
        return self.experts(x_TD, plan).to(x.dtype).view(x.shape), plan


def wanted_ranks(prob_TE: Tensor, threshold: float) -> Tensor:
    """int32 (T, E): rank while the float32 sum of the likelier experts is below ``threshold``, else ``UNWANTED``."""
    sorted_TE, expert_TE = prob_TE.sort(dim=-1, descending=True)
    wanted_TE = sorted_TE.cumsum(dim=-1) - sorted_TE < threshold
    wanted_TE[:, :1] = True
    rank_E = torch.arange(prob_TE.size(-1), dtype=torch.int32, device=prob_TE.device)
    rank_TE = rank_E.expand_as(expert_TE).masked_fill(~wanted_TE, UNWANTED)
    return torch.empty_like(rank_TE).scatter_(1, expert_TE, rank_TE)


def serve(prob_TE: Tensor, rank_TE: Tensor, capacity: int) -> Tensor:
    """bool (T, E): the pairs each expert serves, at most ``capacity``."""
    wanted_TE = rank_TE != UNWANTED
    most = wanted_TE.sum(dim=-1).max().float()
    priority_TE = (most - rank_TE.float() + prob_TE).masked_fill(~wanted_TE, -torch.inf)
    served_CE = priority_TE.topk(capacity, dim=0).indices
    return torch.zeros_like(wanted_TE).scatter_(0, served_CE, True) & wanted_TE


@register_model(ARCH)
class ReleasedTransformer(MoETransformerModel):
    """``xmoe_transformer`` whose MoE layers follow the released rules."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> ReleasedTransformer:
        """As its parent; ValueError for a router other than threshold."""
        if args.moe_router != "threshold":
            raise ValueError(f"{ARCH} knows the threshold router, not {args.moe_router}; use xmoe_transformer")
        model = super().build_model(args, task)
        for layer in [*model.encoder.layers, *model.decoder.layers]:
            if hasattr(layer, "moe"):
                layer.moe = ReleasedMoELayer(layer.moe.config)
        return model


@register_model_architecture(ARCH, ARCH)
def as_released(args: Any) -> None:
    """The defaults of ``xmoe_transformer``; an imported checkpoint brings its own."""
    WMT23.apply(args)
    fill_moe_defaults(args)
