"""The flat ``moe_*`` settings of a model: command-line flags, defaults, and their way into a ``MoEConfig``.

fairseq fills nested configuration groups from flags only for its own groups, so every setting here is a flat name; the
same name works as a flag (``--moe-top-k``), in YAML (``moe_top_k``) and in ``--model-overrides``.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from ..moe import MoEConfig


def optional(cast: type) -> Any:
    """An argparse type that also takes ``none``."""

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else cast(text)

    parse.__name__ = f"{cast.__name__} or none"  # argparse shows it in its error
    return parse


def number_or_list(text: str) -> float | list[float]:
    """``0.9``, or ``0.5,0.6,0.7``: one number for each MoE layer."""
    numbers = [float(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


class Setting(NamedTuple):
    """``default`` is XMoE's; ``config`` is the MoEConfig field it fills, None where the model uses it itself."""

    default: Any
    type: Any
    config: str | None
    help: str
    choices: tuple[str, ...] | None = None


SETTINGS: dict[str, Setting] = {
    "moe_router": Setting(
        "threshold",
        str,
        "router",
        "threshold (XMoE), top_k, switch, hash, base, adamoe, or a router you registered",
    ),
    "moe_num_experts": Setting(64, int, "num_experts", "experts per MoE layer"),
    "moe_expert_dim": Setting(
        1024, int, "expert_dim", "hidden units of ONE expert (dense FFN: --encoder-ffn-embed-dim)"
    ),
    "moe_threshold": Setting(
        0.9,
        number_or_list,
        "threshold",
        "probability mass in [0, 1] that a token's experts must reach; one number, or one for each MoE layer "
        "(0.5,0.6,0.7): the encoder's first",
    ),
    "moe_top_k": Setting(None, optional(int), "top_k", "experts a token takes (top_k, adamoe, merged experts)"),
    "moe_max_experts": Setting(
        None, optional(int), "max_experts", "most experts a token takes under the threshold router; none: no limit"
    ),
    "moe_null_experts": Setting(0, int, "num_null_experts", "experts that compute nothing (adamoe)"),
    "moe_capacity_factor": Setting(
        2.0,
        optional(float),
        "capacity_factor",
        "gamma in training: rows an expert takes over the even share; none: no drops",
    ),
    "moe_eval_capacity_factor": Setting(
        None,
        optional(float),
        "eval_capacity_factor",
        "gamma at inference; none (default): no drops, translations do not depend on their batch",
    ),
    "moe_interval": Setting(2, int, None, "every n-th layer is a MoE layer (2: the second, fourth, ...)"),
    "moe_sides": Setting("both", str, None, "which stacks have MoE layers", choices=("encoder", "decoder", "both")),
    "moe_merge_experts": Setting(
        False, bool, "merge_experts", "MEO: merge the chosen experts per sentence, compute once"
    ),
    "moe_token_adapter": Setting(False, bool, "token_adapter", "MEO's token-level adapter before each merged map"),
    "moe_normalize_weights": Setting(
        False, bool, "normalize_weights", "divide a token's weights by their sum over its chosen experts"
    ),
    "moe_input_jitter": Setting(0.0, float, "input_jitter", "in training the router sees x * U(1 - j, 1 + j)"),
    "moe_router_noise": Setting(
        "none",
        str,
        "router_noise",
        "noise on the choosing logits in training",
        choices=("none", "gumbel", "gaussian"),
    ),
    "moe_z_loss_weight": Setting(0.0, float, "z_loss_weight", "weight of the router z-loss"),
    "moe_shared_expert_dim": Setting(0, int, "shared_expert_dim", "hidden units of an FFN every token passes; 0: none"),
    "moe_hash_seed": Setting(1, int, "hash_seed", "seed of the hash router; each layer adds its index"),
    "moe_expert_parallel": Setting(
        False,
        bool,
        "expert_parallel",
        "spread the experts over the ranks (docs/scaling.md); one rank holds them all",
    ),
    "moe_weights": Setting(
        "float",
        str,
        "weights",
        "how the experts' matrices are held; int8 and bfloat16 are for inference and take float checkpoints too",
        choices=("float", "int8", "bfloat16"),
    ),
    "moe_linear_weights": Setting(
        "float",
        str,
        None,
        "how all other linear maps and the embeddings are held; int8 is for inference and takes float checkpoints too",
        choices=("float", "int8"),
    ),
    "moe_compute": Setting(
        "auto",
        str,
        "compute",
        "how experts are computed; auto follows measured rules",
        choices=("auto", "bmm", "grouped", "loop", "masked"),
    ),
}


def add_moe_args(parser: Any) -> None:
    """Add every ``--moe-*`` flag, without defaults: those come from the architecture."""
    for name, setting in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        shown = "none" if setting.default is None else setting.default
        text = f"{setting.help} (XMoE: {shown})"
        if setting.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=setting.type, choices=setting.choices, help=text)


def fill_moe_defaults(args: Any, **defaults: Any) -> None:
    """Give every setting that ``args`` lacks the architecture's default, or XMoE's.

    ``--moe-merge-experts`` given to an architecture of another method brings the router and the capacity it needs.
    """
    if getattr(args, "moe_merge_experts", False):
        defaults.update(moe_router="top_k", moe_capacity_factor=None)
    for name, setting in SETTINGS.items():
        if not hasattr(args, name):
            setattr(args, name, defaults.pop(name, setting.default))
        else:
            defaults.pop(name, None)
    if defaults:
        raise TypeError(f"not MoE settings: {sorted(defaults)}")


def check_moe_names(args: Any) -> None:
    """Refuse a misspelt ``moe_*`` name, which YAML and --model-overrides would otherwise drop silently."""
    names = args.keys() if hasattr(args, "keys") else vars(args).keys()
    unknown = sorted(name for name in names if str(name).startswith("moe_") and name not in SETTINGS)
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}; the moe_* settings are {', '.join(SETTINGS)}")


def moe_config(cfg: Any, *, side: str, layer_index: int, embed_dim: int, dense_dim: int) -> MoEConfig:
    """The configuration of layer ``layer_index`` (from 0) of ``side`` from a model's flat settings."""
    fields = {setting.config: getattr(cfg, name) for name, setting in SETTINGS.items() if setting.config}
    fields["threshold"] = cfg.layer_thresholds[side, layer_index]
    fields["hash_seed"] += layer_index + (1000 if side == "decoder" else 0)  # another hash in every layer
    return MoEConfig(
        embed_dim=embed_dim,
        activation=str(cfg.activation_fn),
        activation_dropout=cfg.activation_dropout or cfg.relu_dropout or 0.0,
        dense_dim=dense_dim,
        **fields,
    )


def is_moe_layer(cfg: Any, side: str, layer_index: int) -> bool:
    """Whether layer ``layer_index`` (from 0) of ``side`` is a MoE layer."""
    if cfg.moe_interval < 1:
        raise ValueError(
            f"moe_interval ({cfg.moe_interval}) must be at least 1; 2 makes every second layer a MoE layer"
        )
    if cfg.moe_sides not in ("encoder", "decoder", "both"):
        raise ValueError(f"moe_sides ({cfg.moe_sides!r}) must be encoder, decoder or both")
    return cfg.moe_sides in (side, "both") and (layer_index + 1) % cfg.moe_interval == 0


def layer_thresholds(cfg: Any, sides: tuple[str, ...]) -> dict[tuple[str, int], float]:
    """The threshold of every MoE layer by (side, index in its stack), in the order of a list in ``moe_threshold``.

    Args:
        sides: the stacks that the model has, encoder before decoder.
    Raises: ValueError for a list that has not one number for each MoE layer.
    """
    places = [
        (side, index)
        for side in sides
        for index in range(getattr(cfg, f"{side}_layers"))
        if is_moe_layer(cfg, side, index)
    ]
    given = cfg.moe_threshold
    if isinstance(given, (int, float)):
        return dict.fromkeys(places, float(given))
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError):
        raise ValueError(f"moe_threshold ({given!r}) must be a number in [0, 1], or a list of such numbers") from None
    if len(values) != len(places):
        names = ", ".join(f"{side} {index}" for side, index in places)
        raise ValueError(
            f"moe_threshold has {len(values)} numbers ({given}), but the model has {len(places)} MoE layers ({names}); "
            "give one number for all layers, or one for each"
        )
    return dict(zip(places, values, strict=True))


def check_supported(args: Any) -> None:
    """Refuse fairseq options that a MoE layer cannot honour."""
    if getattr(args, "quant_noise_pq", 0):
        raise ValueError("--quant-noise-pq quantises dense FFN weights and does not reach experts; set it to 0")
    if getattr(args, "offload_activations", False):
        raise ValueError("--offload-activations does not work with MoE layers; --checkpoint-activations does")
