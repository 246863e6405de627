"""MoEConfig: the settings of one mixture-of-experts layer, as a frozen record that checks itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from typing import Any

from .activations import ACTIVATIONS
from .registry import LAYERS, RESERVED, router_class, router_settings, routers_with
from .settings import Setting, at_least_one, below_one, declare, not_negative, positive

# Denominators in which gamma is read, e.g. 1.1 as 11 / 10.
_LARGEST_DENOMINATOR = 10**9
_GAMMA: dict[str, Any] = {
    "optional": True,
    "check": positive,
    "allowed": "be > 0; 1 is an even share per expert, None never drops",
}
_OFF_AT_ZERO: dict[str, Any] = {"check": not_negative, "allowed": "not be negative; 0 turns it off"}
_COUNT: dict[str, Any] = {"check": at_least_one, "allowed": "be at least 1, a whole number"}
_FACTOR: dict[str, Any] = {"check": positive, "allowed": "be > 0; 1 starts as published"}
_SHARE: dict[str, Any] = {"check": below_one, "allowed": "be in [0, 1)"}


@dataclass(frozen=True, init=False)
class MoEConfig:
    """Shape, router and capacity of one mixture-of-experts feed-forward layer.

    ``MoEConfig(embed_dim, num_experts, expert_dim, router="threshold", threshold=0.9, capacity_factor=2.0, ...)`` takes
    the fields below and the settings that routers declare (routers/), all by name; both are attributes of the record,
    e.g. ``config.threshold``. A field's declaration has its help; flags, YAML, checkpoints and errors are made from it.

    Attributes:
        router: a registered name: threshold, top_k, switch, hash, base, adamoe, or one of your own.
        capacity_factor: gamma of Eq 3 in training.
        eval_capacity_factor: gamma at inference. A number saves compute but makes outputs depend on the batch, on its
            order and, in a decoder, on later tokens.
        min_capacity: rows every expert may take however small the batch (never more than there are tokens).
        merge_experts: MEO (arXiv 2310.09832). Its router is top_k and it has no capacity; both are set so if they
            are not given.
        normalize_weights: as in Mixtral (arXiv 2401.04088); XMoE's weights are the raw probabilities (Eq 2).
        input_jitter: as in Switch (arXiv 2101.03961).
        gate_init_scale: at 1, the logits of layer-normed inputs begin with a standard deviation of 1 / sqrt(3), so that
            a threshold of 0.9 needs about three quarters of 32 or 64 experts (docs/results-routers.md).
        z_loss_weight: of mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906).
        shared_expert_dim: as in DeepSeekMoE (arXiv 2401.06066).
        dense_dim: hidden units of the dense FFN that this layer stands for; only FLOP figures use it. None: expert_dim.
        router_settings: (name, value) of everything that routers declare; give them by their names.

    Raises:
        ValueError: a value that is not allowed, with the way out.
        TypeError: a name that is not a setting.
    """

    embed_dim: int = declare(0, int, "model width", flat="embed_dim", **_COUNT)
    num_experts: int = declare(64, int, "experts per MoE layer", **_COUNT)
    expert_dim: int = declare(1024, int, "hidden units of ONE expert (dense FFN: --encoder-ffn-embed-dim)", **_COUNT)
    router: str = declare("threshold", str, "threshold (XMoE), another registered router, or one of your own")
    capacity_factor: float | None = declare(
        2.0, float, "gamma in training: rows an expert takes over the even share; none: no drops", **_GAMMA
    )
    eval_capacity_factor: float | None = declare(
        None, float, "gamma at inference; none: no drops, translations do not depend on their batch", **_GAMMA
    )
    min_capacity: int = declare(4, int, "rows every expert may take", flat="min_capacity", **_COUNT)
    activation: str = declare("gelu", str, "between the maps", flat="activation", choices=tuple(ACTIVATIONS))
    activation_dropout: float = declare(0.0, float, "on hidden units", flat="activation_dropout", **_SHARE)
    merge_experts: bool = declare(False, bool, "MEO: merge the chosen experts per sentence, compute once")
    token_adapter: bool = declare(False, bool, "MEO's token-level adapter before each merged map")
    normalize_weights: bool = declare(False, bool, "divide a token's weights by their sum over its chosen experts")
    input_jitter: float = declare(0.0, float, "in training the router sees x * U(1 - j, 1 + j)", **_SHARE)
    gate_init_scale: float = declare(
        1.0, float, "factor of the gate's first weights; above 1 a new router is more decided", **_FACTOR
    )
    z_loss_weight: float = declare(0.0, float, "weight of the router z-loss", **_OFF_AT_ZERO)
    shared_expert_dim: int = declare(0, int, "hidden units of an FFN every token passes; 0: none", **_OFF_AT_ZERO)
    dense_dim: int | None = declare(None, int, "of the FFN replaced", flat="dense_dim", optional=True, **_COUNT)
    expert_parallel: bool = declare(
        False, bool, "spread the experts over the ranks (docs/scaling.md); one rank holds them all"
    )
    weights: str = declare(
        "float",
        str,
        "how the experts' matrices are held; int8 and bfloat16 are for inference and take float checkpoints too",
        choices=("float", "int8", "bfloat16"),
    )
    compute: str = declare(
        "auto",
        str,
        "how the layer is computed; auto: kernels on CUDA, else measured rules",
        choices=("auto", "triton", "bmm", "grouped", "loop", "masked"),
    )
    router_settings: tuple[tuple[str, Any], ...] = ()

    def __init__(
        self, embed_dim: int, num_experts: int, expert_dim: int, router: str | None = None, **given: Any
    ) -> None:
        given |= {"embed_dim": embed_dim, "num_experts": num_experts, "expert_dim": expert_dim}
        if router is not None:
            given["router"] = router
        of_routers = router_settings()
        kept = dict(given.pop("router_settings", ()))  # dataclasses.replace() passes on the value that it found
        chosen = {name: given.pop(name, kept.get(name, setting.default)) for name, setting in of_routers.items()}
        values = {setting.name: setting.default for setting in LAYER_SETTINGS}
        values |= LAYERS[_kind(bool(given.get("merge_experts")))].own_defaults
        if unknown := sorted(set(given) - set(values)):
            raise TypeError(f"MoEConfig has no {', '.join(unknown)}; its settings are {', '.join([*values, *chosen])}")
        for name, value in {**values, **given, "router_settings": tuple(chosen.items())}.items():
            object.__setattr__(self, name, value)
        self._check()

    def __getattr__(self, name: str) -> Any:
        """The value of a router's setting, ``config.threshold``."""
        for setting, value in self.__dict__.get("router_settings", ()):
            if setting == name:
                return value
        raise AttributeError(f"MoEConfig has no {name!r}")

    def _check(self) -> None:
        for setting in LAYER_SETTINGS:
            setting.validate(getattr(self, setting.name))
        router = router_class(self.router)
        for name, setting in router_settings().items():
            value = getattr(self, name)
            setting.validate(value)
            if setting not in router.settings and value != setting.default and not setting.ignored_elsewhere:
                off = "none" if setting.default is None else setting.default
                raise ValueError(
                    f"{setting.flat} ({value}) works with moe_router {', '.join(routers_with(name))}, "
                    f"not {self.router}; set {setting.flat} {off} or another moe_router"
                )
        LAYERS[self.layer_kind].check(self)
        router.check(self)

    def refuse(self, names: tuple[str, ...], because: str) -> None:
        """Raise ValueError if one of these settings, which would have no effect, is not at its default."""
        for setting in (*LAYER_SETTINGS, *router_settings().values()):
            value = getattr(self, setting.name)
            if setting.name in names and value != setting.default:
                raise ValueError(f"{setting.flat} ({value}) has no effect {because}; set it to {setting.default}")

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
        return _as_written(gamma)

    @property
    def layer_kind(self) -> str:
        """The registered kind of layer that this describes: ``merged`` or ``routed``."""
        return _kind(self.merge_experts)

    @property
    def row_cost(self) -> float:
        """FLOPs of one kept row, relative to one token through the dense FFN."""
        return self.expert_dim / (self.dense_dim or self.expert_dim)

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one expert on one row, 2 per multiply-add; biases and activation not counted."""
        return 4 * self.embed_dim * self.expert_dim


def _kind(merges: bool) -> str:
    return "merged" if merges else "routed"


# The settings of every layer; those with a flat name ``moe_...`` are settings of a model too.
LAYER_SETTINGS = tuple(Setting(name=f.name, default=f.default, **f.metadata) for f in fields(MoEConfig) if f.metadata)
RESERVED.update(setting.name for setting in LAYER_SETTINGS)


@cache
def _as_written(gamma: float) -> tuple[int, int]:
    """Numerator and denominator of the shortest decimal number that reads as ``gamma``."""
    exact = Fraction(str(gamma)).limit_denominator(_LARGEST_DENOMINATOR)
    return exact.numerator, exact.denominator
