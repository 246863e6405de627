"""The gates of merged experts: noisy top-k over one vector per sentence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..ordering import sort_descending

# Added to the learned standard deviation of the gate's noise, as in the official code.
NOISE_FLOOR = 1e-2


class SentenceGate(nn.Module):
    """Noisy top-k over one vector per sentence. State: ``weight`` and ``noise_weight`` (E, D), initialised to 0.

    Source: Shazeer et al., arXiv 1701.06538, as in MEO's official code.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = choices_merged(config)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.embed_dim))
        self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, config.embed_dim))

    def forward(self, vector_BD: Tensor) -> GateChoice:
        """``vector_BD``: float32; noise is added in training only."""
        with torch.autocast(vector_BD.device.type, enabled=False):
            clean_BE = vector_BD @ self.weight.float().t()
            noisy_BE, scale_BE = clean_BE, None
            if self.training:
                scale_BE = nn.functional.softplus(vector_BD @ self.noise_weight.float().t()) + NOISE_FLOOR
                noisy_BE = clean_BE + torch.randn_like(clean_BE) * scale_BE
            # sort_descending takes numbers >= 0; of equal ones the lower expert comes first
            order_BE = sort_descending(noisy_BE.detach() - noisy_BE.detach().amin(dim=-1, keepdim=True))[1]
            expert_BK = order_BE[:, : self.top_k]
            gate_BK = noisy_BE.gather(1, expert_BK).softmax(dim=-1)
            weight_BE = torch.zeros_like(noisy_BE).scatter(1, expert_BK, gate_BK)
            load_BE = self._load(clean_BE, noisy_BE, scale_BE, order_BE, expert_BK)
        return GateChoice(expert_BK, gate_BK, weight_BE, load_BE)

    def _load(
        self, clean_BE: Tensor, noisy_BE: Tensor, scale_BE: Tensor | None, order_BE: Tensor, expert_BK: Tensor
    ) -> Tensor:
        """1 for a chosen expert, else 0; in training the probability of being chosen over redraws of its own noise."""
        chosen_BE = torch.zeros_like(clean_BE).scatter(1, expert_BK, 1.0)
        if scale_BE is None or self.top_k >= clean_BE.size(-1):
            return chosen_BE
        # an unchosen expert must exceed the k-th value, a chosen expert the value after it
        kth_B1, next_B1 = noisy_BE.gather(1, order_BE[:, self.top_k - 1 : self.top_k + 1]).split(1, dim=1)
        to_beat_BE = torch.where(chosen_BE.bool(), next_B1, kth_B1)
        load_BE: Tensor = torch.special.ndtr((clean_BE - to_beat_BE) / scale_BE)
        return load_BE


@dataclass(frozen=True)
class GateChoice:
    """The decision of one gate.

    Attributes:
        expert_BK: int64, K different experts, likeliest first.
        gate_BK: float32 with gradient, rows sum to 1: a softmax over the K chosen logits.
        weight_BE: float32: the same over all experts, 0 where not chosen.
        load_BE: float32: 1 and 0, or in training the probability of being chosen.
    """

    expert_BK: Tensor
    gate_BK: Tensor
    weight_BE: Tensor
    load_BE: Tensor

    def spread(self, real_B: Tensor | None) -> Tensor:
        """float32 (2, E): importance and load, summed over the sentences that have a real token."""
        both_2BE = torch.stack([self.weight_BE, self.load_BE])
        if real_B is not None:
            both_2BE = both_2BE.masked_fill(~real_B.view(1, -1, 1), 0.0)
        return both_2BE.sum(dim=1)


def masked_mean(x_TBD: Tensor, real_TB: Tensor | None) -> Tensor:
    """float32 (B, D): mean over the positions that are not padding; 0 for a sentence without any."""
    x_TBD = x_TBD.float()
    if real_TB is None:
        return x_TBD.sum(dim=0) / max(x_TBD.size(0), 1)
    total_BD = x_TBD.masked_fill(~real_TB.unsqueeze(-1), 0.0).sum(dim=0)
    return total_BD / real_TB.sum(dim=0).clamp(min=1).unsqueeze(-1)


def choices_merged(config: MoEConfig) -> int:
    """K: experts merged per sentence and map."""
    return int(config.top_k)
