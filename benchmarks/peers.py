"""Other ways to compute the same kind of layer, to be timed beside ours. Written for comparison, not for use.

Axis letters: T tokens, D width, E experts, F hidden units of one expert, C capacity, K choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class DenseFFN(nn.Module):
    """Two linear maps with GELU: what every ratio is measured against."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x_TD)))


class _ThresholdGate(nn.Module):
    """Softmax, full sort, cumulative mass: probability and rank of every (token, expert) pair."""

    def __init__(self, width: int, num_experts: int, threshold: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.threshold = threshold

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prob_TE = self.gate(x_TD).softmax(-1)
        sorted_TE, expert_TE = prob_TE.sort(-1, descending=True)
        taken_TE = sorted_TE.cumsum(-1) - sorted_TE < self.threshold
        taken_TE[:, 0] = True
        wanted_TE = torch.zeros_like(taken_TE).scatter(1, expert_TE, taken_TE)
        rank_TE = torch.empty_like(expert_TE).scatter(
            1, expert_TE, torch.arange(prob_TE.size(1), device=prob_TE.device).expand_as(expert_TE)
        )
        return prob_TE, rank_TE, wanted_TE


class LoopOverExperts(nn.Module):
    """The official code's way: a top-C selection over the full (tokens x experts) priorities, then, expert by expert,
    an indexed read of its C rows, a module call and an indexed sum into the output. Every expert computes; spare places
    hold unrouted tokens at weight 0. Autograd fills and adds a (T, D) gradient for each of these reads."""

    def __init__(self, width: int, num_experts: int, hidden: int, threshold: float, gamma: float) -> None:
        super().__init__()
        self.route = _ThresholdGate(width, num_experts, threshold)
        self.experts = nn.ModuleList(DenseFFN(width, hidden) for _ in range(num_experts))
        self.gamma = gamma

    def forward(self, x_TD: Tensor) -> Tensor:
        num_tokens, num_experts = x_TD.size(0), len(self.experts)
        prob_TE, rank_TE, wanted_TE = self.route(x_TD)
        priority_TE = (num_experts - rank_TE + prob_TE) * wanted_TE
        capacity = min(num_tokens, max(4, math.ceil(self.gamma * num_tokens / num_experts)))
        token_CE = priority_TE.topk(capacity, dim=0).indices
        weight_TE = prob_TE * wanted_TE * torch.zeros_like(prob_TE).scatter_(0, token_CE, 1.0)
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            token_C = token_CE[:, index]
            y_TD[token_C] += expert(x_TD[token_C]) * weight_TE[:, index][token_C].unsqueeze(-1)
        return y_TD


class PlainBatched(nn.Module):
    """Stacked weights and batched GEMMs, left to autograd: keeps gathered rows and expert outputs."""

    def __init__(self, width: int, num_experts: int, hidden: int, threshold: float, gamma: float) -> None:
        super().__init__()
        self.route = _ThresholdGate(width, num_experts, threshold)
        self.w1 = nn.Parameter(torch.randn(num_experts, width, hidden) / math.sqrt(width))
        self.b1 = nn.Parameter(torch.zeros(num_experts, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden, width) / math.sqrt(hidden))
        self.b2 = nn.Parameter(torch.zeros(num_experts, 1, width))
        self.gamma = gamma

    def forward(self, x_TD: Tensor) -> Tensor:
        num_tokens, num_experts = x_TD.size(0), self.w1.size(0)
        prob_TE, rank_TE, wanted_TE = self.route(x_TD)
        priority_TE = (num_experts - rank_TE + prob_TE) * wanted_TE
        capacity = min(num_tokens, max(4, math.ceil(self.gamma * num_tokens / num_experts)))
        token_CE = priority_TE.topk(capacity, dim=0).indices
        token_R = token_CE.t().reshape(-1)
        weight_R1 = (prob_TE * wanted_TE).gather(0, token_CE).t().reshape(-1, 1)
        rows_ECD = x_TD[token_R].view(num_experts, capacity, -1)
        hidden = nn.functional.gelu(torch.baddbmm(self.b1, rows_ECD, self.w1))
        out_RD = torch.baddbmm(self.b2, hidden, self.w2).flatten(0, 1)
        return torch.zeros_like(x_TD).index_add(0, token_R, out_RD * weight_R1)


class ExpertGemms(nn.Module):
    """The batched GEMMs alone, on rows that are already in place: the floor of what a batched layer can reach."""

    def __init__(self, width: int, num_experts: int, hidden: int, rows_per_expert: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, width, hidden) / math.sqrt(width))
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden, width) / math.sqrt(hidden))
        self.shape = (num_experts, rows_per_expert, width)

    def forward(self, rows: Tensor) -> Tensor:
        return (rows.view(self.shape) @ self.w1 @ self.w2).view(-1, self.shape[-1])


def fairscale_moe(width: int, num_experts: int, hidden: int) -> nn.Module:
    """fairscale's MOELayer with its top-2 gate (capacity 2 T / E, fixed) on one process; starts a process group."""
    import tempfile

    import torch.distributed as dist
    from fairscale.nn import MOELayer, Top2Gate

    if not dist.is_initialized():
        store = dist.FileStore(f"{tempfile.mkdtemp()}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    experts = nn.ModuleList(DenseFFN(width, hidden) for _ in range(num_experts))
    layer = MOELayer(Top2Gate(width, num_experts), experts)

    class OneSentence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x_TD: Tensor) -> Tensor:
            return self.layer(x_TD.unsqueeze(1)).squeeze(1)

    return OneSentence()


class GroupedGemms(nn.Module):
    """torch's grouped GEMMs with GELU between them, on rows that are already in place: a floor for ragged layers."""

    def __init__(self, width: int, num_experts: int, hidden: int, rows_per_expert: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, width, hidden) / math.sqrt(width))
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden, width) / math.sqrt(hidden))
        self.num_rows = num_experts * rows_per_expert
        end_E = torch.arange(1, num_experts + 1, dtype=torch.int32) * rows_per_expert
        self.register_buffer("end_E", end_E, persistent=False)

    def forward(self, rows_RD: Tensor) -> Tensor:
        grouped = torch.nn.functional.grouped_mm
        hidden_RF = nn.functional.gelu(grouped(rows_RD, self.w1, offs=self.end_E))
        return grouped(hidden_RF, self.w2, offs=self.end_E)


def scatter_moe(width: int, num_experts: int, hidden: int, top_k: int) -> nn.Module:
    """ScatterMoE's layer (shawntan/scattermoe) with a plain top-k router; no capacity, no biases. CUDA only."""
    from scattermoe.mlp import MLP

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(width, num_experts, bias=False)
            self.experts = MLP(width, hidden, num_experts, top_k, activation=nn.GELU())

        def forward(self, x_TD: Tensor) -> Tensor:
            prob_TK, expert_TK = self.gate(x_TD).float().softmax(-1).topk(top_k, dim=-1)
            return self.experts(x_TD, prob_TK.to(x_TD.dtype), expert_TK)

    return Routed()
