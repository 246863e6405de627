"""Expert parallelism: the experts of a layer spread over the ranks, their rows exchanged by all-to-all.

Of E experts on W ranks, rank r holds experts r * E / W to (r + 1) * E / W - 1. Everything else is as in data
parallelism: each rank has the whole router and routes its own tokens, with its own capacity. Only the rows of kept
(token, expert) pairs are exchanged: sent with their routing weight, returned as weighted outputs. The result is that of
replicated experts up to the order of float32 sums; activation dropout draws other random numbers.

A rank computes the whole gradient of its experts, the sum over the tokens of all ranks. Data-parallel training expects
a mean over ranks, so this gradient is divided by W. The parameters have the attribute ``expert = True``, by which
fairseq leaves them out of its all-reduce.

Here T and A are the tokens and assignments of this rank, and R the rows that it receives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..compiling import not_compiled
from ..config import MoEConfig
from ..plan import RoutingPlan
from ..quantised.experts import QUANTISED
from .layouts import TokenRows
from .stacked import Experts

WEIGHTS = ("w1", "b1", "w2", "b2")


def num_ranks() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def build_experts(config: MoEConfig) -> Any:
    """Experts in the format ``config.weights``, spread over the ranks if ``config`` asks for it and there are several.

    Raises:
        ValueError: quantised experts on several ranks.
    """
    spread = config.expert_parallel and num_ranks() > 1
    if config.weights == "float":
        return ParallelExperts(config) if spread else Experts(config)
    if spread:
        raise ValueError(
            f"moe_weights {config.weights} with moe_expert_parallel runs on one rank, not on {num_ranks()}; "
            "translate with a process for each share of the text instead (xmoe translate --workers)"
        )
    return QUANTISED[config.weights](config)


def experts_class(config: MoEConfig) -> Any:
    """The class that holds all experts of a checkpoint with this configuration."""
    return Experts if config.weights == "float" else QUANTISED[config.weights]


def local_slice(num_experts: int) -> slice:
    """The experts of this rank.

    Raises:
        ValueError: the experts cannot be spread evenly.
    """
    ranks = num_ranks()
    if num_experts % ranks:
        above = -(-num_experts // ranks) * ranks
        raise ValueError(
            f"moe_num_experts ({num_experts}) must be a multiple of the number of ranks ({ranks}) with "
            f"moe_expert_parallel; try {above} experts, another number of ranks, or leave moe_expert_parallel out"
        )
    each = num_experts // ranks
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


class ParallelExperts(Experts):
    """The L experts of this rank; it is called like ``Experts``, with the tokens and the plan of this rank.

    Every rank must run the same forward and backward passes in the same order, each with any number of tokens, also
    with 0. It is initialised with its slice of what ``Experts`` would be initialised with.

    State: ``w1`` (L, D, F), ``b1`` (L, F), ``w2`` (L, F, D), ``b2`` (L, D); loading also takes all E
    experts and keeps its slice.
    """

    def __init__(self, config: MoEConfig) -> None:
        self.held = local_slice(config.num_experts)
        super().__init__(config)
        self.num_experts = config.num_experts
        self.config = _local_config(config, self.held.stop - self.held.start)
        for name in WEIGHTS:
            local = nn.Parameter(getattr(self, name).detach()[self.held].clone())
            local.expert = True  # type: ignore[attr-defined]
            local.register_hook(_mean_over_ranks)
            setattr(self, name, local)

    @not_compiled  # communicates
    def forward(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        """Sum over each token's kept experts, on any rank, of weight * expert(x): (T, D)."""
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            x_TD = x_TD.to(torch.get_autocast_dtype(device))  # half-precision rows halve the bytes that are sent
        exchange = _Exchange(plan)
        x_RD, weight_R = _ToExperts.apply(x_TD, plan.weight_A, exchange)
        out_RD = super().forward(x_RD, exchange.local_plan(weight_R))
        out_TD: Tensor = _FromExperts.apply(out_RD, exchange)
        return out_TD

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in WEIGHTS:
            whole = state_dict.get(prefix + name)
            if whole is not None and whole.size(0) == self.num_experts:
                state_dict[prefix + name] = whole[self.held]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _local_config(config: MoEConfig, num_local: int) -> MoEConfig:
    """The part of a configuration that ``Experts`` reads, for this rank's experts."""
    return MoEConfig(
        embed_dim=config.embed_dim,
        num_experts=num_local,
        expert_dim=config.expert_dim,
        activation=config.activation,
        activation_dropout=config.activation_dropout,
        compute=config.compute,
    )


def _mean_over_ranks(grad: Tensor) -> Tensor:
    return grad / num_ranks()


class _Exchange:
    """Numbers of rows that the ranks exchange for one plan. On a GPU it waits for them.

    Attributes:
        rows: rows of this rank's tokens by expert.
        sent: number of rows to each rank.
        received: number of rows from each rank.
        count_SL: int64, rows from each rank for each expert of this rank.
    """

    def __init__(self, plan: RoutingPlan) -> None:
        ranks = num_ranks()
        self.rows = TokenRows(plan)
        count_SL = plan.count_E.view(ranks, -1).contiguous()
        self.count_SL = torch.empty_like(count_SL)
        dist.all_to_all_single(self.count_SL, count_SL)
        self.sent, self.received = torch.stack([count_SL.sum(dim=1), self.count_SL.sum(dim=1)]).tolist()

    def send(self, rows: Tensor) -> Tensor:
        return _all_to_all(rows, self.sent, self.received)

    def send_back(self, rows: Tensor) -> Tensor:
        return _all_to_all(rows, self.received, self.sent)

    def local_plan(self, weight_R: Tensor) -> RoutingPlan:
        """Plan of the received rows, each a token with one expert; they are sorted by source rank, then by expert."""
        num_ranks, num_local = self.count_SL.shape
        expert_L = torch.arange(num_local, device=weight_R.device)
        expert_R = expert_L.repeat(num_ranks).repeat_interleave(self.count_SL.view(-1), output_size=sum(self.received))
        expert_A, order_A = torch.sort(expert_R, stable=True)
        count_L = self.count_SL.sum(dim=0)
        return RoutingPlan(
            token_index_A=order_A,
            expert_index_A=expert_A,
            weight_A=weight_R.index_select(0, order_A),
            count_E=count_L,
            wanted_E=count_L,
            num_tokens=weight_R.numel(),
            num_real_tokens=count_L.sum(),
            balance=None,
            entropy=weight_R.new_zeros(()),
            z_loss=None,
            capacity=None,
        )


def _all_to_all(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
    return arrived


class _ToExperts(torch.autograd.Function):
    """(T, D) and (A,) of this rank -> (R, D) and (R,) of this rank's experts.

    Rows and weights are in one function, so that all ranks run the two exchanges of its backward pass in one order.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_A: Tensor, exchange: _Exchange) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        return exchange.send(exchange.rows.gather(x_TD)), exchange.send(weight_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor, grad_R: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange = ctx.exchange
        grad_TD = exchange.rows.combine(exchange.send_back(grad_RD), None)
        return grad_TD, exchange.send_back(grad_R), None


class _FromExperts(torch.autograd.Function):
    """(R, D) of this rank's experts -> (T, D): rows are sent back and summed by token."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.rows.combine(exchange.send_back(out_RD), None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        return exchange.send(exchange.rows.gather(grad_TD.contiguous())), None


def gather_experts(local: Tensor) -> Tensor | None:
    """The tensor of all experts from each rank's (L, ...): (E, ...) on the CPU of rank 0; None on other ranks.

    Every rank must call it. Rank 0's device holds at most one copy of the whole tensor.
    """
    local = local.detach().contiguous()
    first = dist.get_rank() == 0
    parts = [torch.empty_like(local) for _ in range(num_ranks())] if first else None
    dist.gather(local, parts, dst=0)
    return None if parts is None else torch.cat([part.cpu() for part in parts])


def norm_over_ranks(shared_norm: Tensor, local_grads: list[Tensor]) -> Tensor:
    """L2 norm of all gradients: of the shared parameters (``shared_norm``) and of the experts of every rank.

    Args:
        shared_norm: float32 scalar, equal on all ranks.
        local_grads: gradients of this rank's experts.
    """
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in local_grads]
    squares = torch.stack(norms).square().sum() if norms else torch.zeros_like(shared_norm)
    dist.all_reduce(squares)
    return (shared_norm.square() + squares.to(shared_norm.device)).sqrt()
