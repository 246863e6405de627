"""BASE layers: a balanced assignment in training, the best expert at test, a sigmoid gate (arXiv 2103.16716)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment  # exact and compiled; fairseq's libbase is optional
from torch import Tensor

from .. import host
from ..config import MoEConfig
from ..plan import Choices
from ..registry import register_router
from .auction import auction_assignment
from .router import Router, real_choices

# An exact assignment costs about n^3 on the host: 40 ms for 1024 tokens on one core, 1.8 s for 4096.
EXACT_TOKENS = 1024


def balanced_assignment(score_NE: Tensor) -> Tensor:
    """Give each expert floor(N / E) or ceil(N / E) tokens with the largest possible sum of scores.

    The assignment is exact for up to ``EXACT_TOKENS`` tokens on a CPU. More tokens, and all tokens on other devices,
    are assigned by an auction on the device. Its sum is less than the largest by at most N * 0.002 standard deviations
    of the scores (auction.py; measured: N * 0.00001).

    Args:
        score_NE: float, larger is better; values that are not finite count as 0.
    Returns:
        int64 (N,) on the device of ``score_NE``.
    """
    num_tokens, num_experts = score_NE.shape
    # scores that are not finite become 0 here; the gate still has the NaN, which training finds in the loss
    score_NE = score_NE.detach().double().nan_to_num(0.0, 0.0, 0.0)
    if num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=score_NE.device)
    few = num_tokens <= EXACT_TOKENS if host.on_cpu(score_NE) else num_tokens < 2 * num_experts
    if few or num_tokens < num_experts:
        return torch.from_numpy(exact_assignment(score_NE.cpu().numpy())).to(score_NE.device)
    return auction_assignment(score_NE).expert_N


def exact_assignment(score_NE: np.ndarray) -> np.ndarray:
    """int64 (N,) from float64 scores, on the CPU, as an assignment of rows (tokens, fillers) to columns (places)."""
    num_tokens, num_experts = score_NE.shape
    if num_tokens == 0:
        return np.empty(0, dtype=np.int64)
    each, extra = divmod(num_tokens, num_experts)
    expert_of_place = np.repeat(np.arange(num_experts), each)
    value = score_NE[:, expert_of_place]
    if extra:
        # every expert has one more place; E - extra filler rows, allowed only in these places, take the unused ones
        fillers = num_experts - extra
        never = -1e6 * (1.0 + np.abs(score_NE).max())
        filler_value = np.concatenate([np.full((fillers, value.shape[1]), never), np.zeros((fillers, num_experts))], 1)
        value = np.concatenate([np.concatenate([value, score_NE], axis=1), filler_value])
        expert_of_place = np.concatenate([expert_of_place, np.arange(num_experts)])
    rows, places = linear_sum_assignment(value, maximize=True)
    expert_N = np.empty(len(rows), dtype=np.int64)
    expert_N[rows] = expert_of_place[places]
    return expert_N[:num_tokens]


@register_router("base")
class BaseLayersRouter(Router):
    """In training a balanced assignment of this rank's tokens, at inference the best expert; weight = sigmoid(score).

    There is no balance loss, because the assignment is balanced. Expert vectors are initialised nearly orthogonal with
    a small gain, as in the paper's code.
    """

    unused = ("normalize_weights", "z_loss_weight")
    weights_by_softmax = False

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        torch.nn.init.orthogonal_(self.weight, gain=0.1 * config.gate_init_scale)

    @classmethod
    def experts_wanted(cls, config: MoEConfig) -> float | None:
        return 1.0

    def forward(self, x_TD: Tensor, real_T: Tensor | None, token_ids_T: Tensor | None) -> Choices:
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = self._router_input(x_TD) @ self.weight.float().t()
            gate_TE = torch.sigmoid(score_TE)
        expert_T1 = self._expert(score_TE, real_T)
        return Choices(
            expert_TK=expert_T1,
            chosen_TK=real_choices(expert_T1, None, real_T),
            score_TK=gate_TE.detach().gather(1, expert_T1),
            weight_TE=gate_TE,
            balance=None,
            entropy=score_TE.new_zeros(()),
        )

    def _expert(self, score_TE: Tensor, real_T: Tensor | None) -> Tensor:
        """int64 (T, 1); the value at padding is not used."""
        expert_T = score_TE.detach().argmax(dim=-1)
        if self.training:
            if real_T is None:
                expert_T = balanced_assignment(score_TE)
            else:
                expert_T[real_T] = balanced_assignment(score_TE[real_T])
        return expert_T.unsqueeze(-1)
