"""What a mixture-of-experts layer is made of: one frozen record that checks itself."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from .activations import ACTIVATIONS
from .registry import router_class

# Of the fraction that a capacity factor is read as: nine decimals exactly, and 1/3 from 0.3333333333333333.
_LARGEST_DENOMINATOR = 10**9


class _NotGiven:
    """Marks a default value, to tell it from the same value that somebody asked for."""


class _DefaultName(_NotGiven, str):
    pass


class _DefaultFactor(_NotGiven, float):
    pass


@dataclass(frozen=True)
class MoEConfig:
    """Shape, router and capacity of one mixture-of-experts feed-forward layer.

    Attributes:
        embed_dim: model width D.
        num_experts: experts E (true experts; null experts are counted apart).
        expert_dim: hidden units F of ONE expert. A dense FFN of 2048 units cut in four has 512.
        router: a registered router name: threshold, top_k, switch, hash, base, adamoe, or one of your own.
        threshold: probability mass t a token's experts must reach, in [0, 1] (Eq 5). 0: top-1. 1: every expert.
        top_k: experts a token takes (top_k, adamoe, merge_experts); None where the router does not count.
        max_experts: most experts a token takes under the threshold router; None (default): as many as it needs.
        num_null_experts: experts that compute nothing (adamoe, arXiv 2406.13233).
        capacity_factor: gamma of Eq 3 in training, > 0; None trains without drops.
        eval_capacity_factor: gamma at inference. None (default) drops nothing, so that the translation of a sentence
            does not depend on its neighbours. A number saves compute but makes outputs depend on the batch, on its
            order and, in a decoder, on later tokens.
        min_capacity: rows every expert may take however small the batch (never more than there are tokens).
        activation: name of the function between the two linear maps.
        activation_dropout: dropout probability on the hidden units, in [0, 1).
        merge_experts: MEO (arXiv 2310.09832): merge the chosen experts' matrices per sentence and compute once. Its
            router is top_k and it has no capacity; both are set so where they are not given.
        token_adapter: MEO's token-level bottleneck before each merged linear map.
        normalize_weights: divide the weights of a token by their sum over its chosen experts (Mixtral,
            arXiv 2401.04088); off in XMoE, whose weights are the raw probabilities (Eq 2).
        input_jitter: in training the router sees x * U(1 - j, 1 + j) (Switch, arXiv 2101.03961).
        router_noise: none, gumbel or gaussian noise on the logits that choose, in training only (the weights stay
            those of the clean logits; gaussian as in arXiv 1701.06538 with standard deviation 1 / E).
        z_loss_weight: weight of the router z-loss mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906).
        shared_expert_dim: hidden units of one FFN that every token passes beside its experts
            (DeepSeekMoE, arXiv 2401.06066); 0 for none.
        hash_seed: seed of the hash router's fixed random hash.
        dense_dim: hidden units of the dense FFN that this layer stands for; only FLOP figures use it. None: expert_dim.
        expert_parallel: spread the experts over the ranks of torch.distributed (experts/ranks.py); without several
            ranks it changes nothing.
        weights: how the experts' matrices are held: float (the model's dtype; the only one that trains), int8 (one
            scale per output channel) or bfloat16 (quantised/experts.py).
        compute: how experts are computed: auto (measured rules in experts/stacked.py), bmm, grouped, loop or masked.

    Raises:
        ValueError: a value that is not allowed, with the way out.
    """

    embed_dim: int
    num_experts: int
    expert_dim: int
    router: str = _DefaultName("threshold")
    threshold: float = 0.9
    top_k: int | None = None
    max_experts: int | None = None
    num_null_experts: int = 0
    capacity_factor: float | None = _DefaultFactor(2.0)
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    activation: str = "gelu"
    activation_dropout: float = 0.0
    merge_experts: bool = False
    token_adapter: bool = False
    normalize_weights: bool = False
    input_jitter: float = 0.0
    router_noise: str = "none"
    z_loss_weight: float = 0.0
    shared_expert_dim: int = 0
    hash_seed: int = 1
    dense_dim: int | None = None
    expert_parallel: bool = False
    weights: str = "float"
    compute: str = "auto"

    def __post_init__(self) -> None:
        self._settle_defaults()
        for name in ("embed_dim", "num_experts", "expert_dim", "min_capacity"):
            _require(getattr(self, name) >= 1, f"moe {name} ({getattr(self, name)}) must be at least 1")
        for name in ("num_null_experts", "shared_expert_dim", "z_loss_weight"):
            value = getattr(self, name)
            _require(value >= 0, f"moe {name} ({value}) must not be negative; 0 turns it off")
        _require(
            0.0 <= self.threshold <= 1.0,
            f"moe_threshold ({self.threshold}) must be a probability mass in [0, 1]; 0.9 is the paper's, 0 is top-1",
        )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            allowed = value is None or (value > 0 and math.isfinite(value))
            _require(allowed, f"moe_{name} ({value}) must be > 0; 1 is an even share per expert, None never drops")
        for name in ("input_jitter", "activation_dropout"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"moe {name} ({value}) must be in [0, 1)")
        _require_one_of("moe activation", self.activation, ACTIVATIONS)
        _require_one_of("moe_router_noise", self.router_noise, ("none", "gumbel", "gaussian"))
        _require_one_of("moe_weights", self.weights, ("float", "int8", "bfloat16"))
        _require_one_of("moe_compute", self.compute, ("auto", "bmm", "grouped", "loop", "masked"))
        self._check_router()

    def _settle_defaults(self) -> None:
        """Plain values instead of marked defaults: XMoE's, or those of merged experts."""
        merged = {"router": "top_k", "capacity_factor": None}
        plain = {"router": str, "capacity_factor": float}
        for name, cast in plain.items():
            value: object = getattr(self, name)
            if isinstance(value, _NotGiven):
                object.__setattr__(self, name, merged[name] if self.merge_experts else cast(value))

    def _check_router(self) -> None:
        if self.max_experts is not None:
            _require(
                1 <= self.max_experts <= self.num_experts,
                f"moe_max_experts ({self.max_experts}) must be between 1 and moe_num_experts ({self.num_experts}); "
                "None (on the command line: none) sets no limit",
            )
            _require(
                self.router == "threshold" and not self.merge_experts,
                f"moe_max_experts ({self.max_experts}) limits moe_router threshold, not {self.router}; "
                "set moe_max_experts none, or moe_top_k where the router counts",
            )
        if self.top_k is not None:
            _require(
                1 <= self.top_k <= self.num_experts + self.num_null_experts,
                f"moe_top_k ({self.top_k}) must be between 1 and what there is to choose from, moe_num_experts "
                f"({self.num_experts}) + moe_null_experts ({self.num_null_experts}); lower moe_top_k or raise one of "
                "these",
            )
        _require(
            not self.num_null_experts or router_class(self.router).has_null_experts,
            f"moe_null_experts ({self.num_null_experts}) works with moe_router adamoe, not {self.router}; "
            "set moe_null_experts 0 or moe_router adamoe",
        )
        if self.merge_experts:
            self._check_merge()
        else:
            _require(not self.token_adapter, "moe_token_adapter needs moe_merge_experts; set both or neither")
            router_class(self.router).check(self)

    def _check_merge(self) -> None:
        _require(
            not self.expert_parallel,
            "moe_merge_experts merges whole matrices, which would all have to travel: leave moe_expert_parallel out",
        )
        _require(
            self.top_k is not None,
            "moe_merge_experts needs moe_top_k: the number of experts to merge; MEO's own default is 4",
        )
        _require(
            self.router == "top_k",
            f"moe_merge_experts gates per sentence and ignores moe_router {self.router}; set moe_router top_k",
        )
        _require(
            self.capacity_factor is None and self.eval_capacity_factor is None,
            f"moe_merge_experts serves every token: moe_capacity_factor ({self.capacity_factor}) and "
            f"moe_eval_capacity_factor ({self.eval_capacity_factor}) must be None (on the command line: none)",
        )
        for name, off in (
            ("normalize_weights", False),  # the gates of merged experts always sum to 1
            ("input_jitter", 0.0),
            ("router_noise", "none"),  # they have a learned noise of their own
            ("z_loss_weight", 0.0),
            ("shared_expert_dim", 0),
            ("weights", "float"),
            ("compute", "auto"),
        ):
            value = getattr(self, name)
            _require(value == off, f"moe_{name} ({value}) has no effect with moe_merge_experts; set it to {off}")

    def capacity(self, num_real_tokens: int, training: bool) -> int | None:
        """Rows one expert may take (Eq 3), or None for no limit.

        C = ceil(gamma * T / E), at least ``min_capacity``, never above T, the real tokens of the batch on this rank.
        """
        fraction = self.capacity_fraction(training)
        if fraction is None:
            return None
        numerator, denominator = fraction
        even_share = -(-numerator * num_real_tokens // (denominator * self.num_experts))
        return min(max(even_share, self.min_capacity), num_real_tokens)

    def capacity_fraction(self, training: bool) -> tuple[int, int] | None:
        """Gamma as written, (numerator, denominator), so that the share of Eq 3 is exact in integers; None: no limit.

        ceil(gamma * T / E) = (numerator * T + denominator * E - 1) // (denominator * E). In float64, 1.1 * 400 / 8 is
        a little above 55 and its ceiling 56. The denominator is at most 10^9, which keeps both sides in int64 on a
        device for gamma * T and E below 9 * 10^9.
        """
        gamma = self.capacity_factor if training else self.eval_capacity_factor
        if gamma is None:
            return None
        exact = Fraction(str(gamma)).limit_denominator(_LARGEST_DENOMINATOR)
        return exact.numerator, exact.denominator

    @property
    def layer_kind(self) -> str:
        """Which registered kind of layer this describes: ``merged`` or ``routed``."""
        return "merged" if self.merge_experts else "routed"

    @property
    def row_cost(self) -> float:
        """FLOPs of one kept row, relative to one token through the dense FFN."""
        return self.expert_dim / (self.dense_dim or self.expert_dim)

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one expert on one row, 2 per multiply-add; biases and activation not counted."""
        return 4 * self.embed_dim * self.expert_dim


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_one_of(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(allowed)}")
