"""The base class of routers: the gate's weights, the float32 probabilities, and helpers for ``Choices``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..balance import BalanceTerms, first_choice_terms
from ..config import MoEConfig
from ..plan import Choices
from ..settings import Setting

# Smallest sum of chosen probabilities that weights are divided by; below it null experts have all the probability.
LEAST_MASS = 1e-30


@dataclass(frozen=True)
class KernelRule:
    """The rule of a router's choice, for the kernels.

    Attributes:
        threshold: mass to reach; None: the ``most`` likeliest gates.
        most: most gates of a token.
        num_gates: gates of the softmax, null gates behind the true ones.
        normalize: divide a token's weights by their sum.
        load_of_all: the balance loss counts all choices (AdaMoE), not first ones.
    """

    threshold: float | None
    most: int
    num_gates: int
    normalize: bool = False
    load_of_all: bool = False


class Router(nn.Module):
    """Linear gate with a softmax (Eq 1); subclasses decide which experts a token takes.

    A subclass implements ``choose`` and declares on the class:

    Attributes:
        settings: its own settings beside those of every layer; their values are ``self.config.NAME``.
        unused: settings of every layer that it would silently ignore; a value that is not the default is refused.
        weights_by_softmax: the weight of an expert is its share of a softmax over all experts.

    ``check`` refuses values that do not go together. State: ``weight`` (G, D) float32.
    """

    settings: ClassVar[tuple[Setting, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()
    weights_by_softmax: ClassVar[bool] = True

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(self.num_gates(config), config.embed_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear
        with torch.no_grad():
            self.weight.mul_(config.gate_init_scale)

    @classmethod
    def check(cls, config: MoEConfig) -> None:
        """Raise ValueError when this router cannot serve ``config``."""
        config.refuse(cls.unused, f"with moe_router {config.router}")

    @classmethod
    def num_gates(cls, config: MoEConfig) -> int:
        """G: rows of the gate's weight; 0 for a router without a gate. FLOPs of the gate: 2 x G x D a token."""
        return config.num_experts

    @classmethod
    def state_shapes(cls, config: MoEConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything in the state dict."""
        return {"weight": (cls.num_gates(config), config.embed_dim)}

    @classmethod
    def experts_wanted(cls, config: MoEConfig) -> float | None:
        """Experts that an average token takes before capacity; None: only a run shows."""
        return None

    def kernel_rule(self) -> KernelRule | None:
        """The rule by which kernels choose for this router; None (here): it chooses with torch, by ``choose``."""
        return None

    def choose(self, prob_TG: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        """The choices of one batch.

        Args:
            prob_TG: float32 with gradient, rows sum to 1.
            real_T: bool, False at padding; None: no padding.
            token_ids_T: int64 vocabulary indices, or None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose()")

    def forward(self, x_TD: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        """Choices of the tokens; probabilities are float32, also under autocast and in half precision."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TG = self._router_input(x_TD) @ self.weight.float().t()
            prob_TG = logits_TG.softmax(dim=-1)
            choices = self.choose(prob_TG, real_T, token_ids_T)
        return _with_statistics(choices, logits_TG, prob_TG, real_T, self.config.z_loss_weight)

    def _router_input(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.float()
        jitter = self.config.input_jitter
        if self.training and jitter > 0:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        return x_TD


def probability_choices(
    prob_TE: Tensor,
    expert_TK: Tensor,
    chosen_TK: Tensor | None,
    real_T: Tensor | None,
    *,
    normalize: bool,
    score_TK: Tensor | None = None,
    balance: BalanceTerms | None = None,
) -> Choices:
    """Choices weighted by the raw probability (Eq 2), or by its share among a token's choices if ``normalize``.

    Args:
        prob_TE: float32 with gradient.
        expert_TK: int64, the experts of a token from first choice to last, all different.
        chosen_TK: bool, False where the token does not take the choice; None: it takes all.
        real_T: bool, False at padding; None: no padding.
        score_TK: float32 >= 0; within a column an expert keeps higher scores first. None: the probability.
        balance: terms of the balance loss; None: Eq 7 over first choices.
    """
    chosen_TK = real_choices(expert_TK, chosen_TK, real_T)
    weight_TE = prob_TE
    if normalize:
        mass_T1 = torch.where(chosen_TK, prob_TE.gather(1, expert_TK), 0.0).sum(dim=-1, keepdim=True)
        # for a smaller mass the gradient 1 / mass would overflow; such a token keeps its weights, which are near 0
        weight_TE = prob_TE / torch.where(mass_T1 > LEAST_MASS, mass_T1, 1.0)
    return Choices(
        expert_TK=expert_TK,
        chosen_TK=chosen_TK,
        score_TK=prob_TE.detach().gather(1, expert_TK) if score_TK is None else score_TK,
        weight_TE=weight_TE,
        balance=first_choice_terms(prob_TE, expert_TK[:, 0], real_T) if balance is None else balance,
        entropy=prob_TE.new_zeros(()),
    )


def real_choices(expert_TK: Tensor, chosen_TK: Tensor | None, real_T: Tensor | None) -> Tensor:
    """bool (T, K): ``chosen_TK`` (None: all True) with False at padding."""
    if chosen_TK is None:
        chosen_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    return chosen_TK if real_T is None else chosen_TK & real_T.unsqueeze(-1)


def _with_statistics(
    choices: Choices, logits_TG: Tensor, prob_TG: Tensor, real_T: Tensor | None, z_loss_weight: float
) -> Choices:
    with torch.no_grad():
        # the entropy of a softmax: logsumexp - sum p * logit, in which a probability of 0 adds 0
        log_mass_T = logits_TG.logsumexp(dim=-1)
        entropy = mean_over_real(log_mass_T - (prob_TG * logits_TG).sum(dim=-1), real_T)
    z_loss = None
    if z_loss_weight > 0:
        z_loss = z_loss_weight * mean_over_real(logits_TG.logsumexp(dim=-1) ** 2, real_T)
    return choices._replace(entropy=entropy, z_loss=z_loss)


def mean_over_real(value_T: Tensor, real_T: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding; 0 if there are none."""
    if real_T is None:
        return value_T.sum() / max(value_T.numel(), 1)
    return torch.where(real_T, value_T, 0.0).sum() / real_T.sum().clamp(min=1)
