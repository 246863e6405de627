"""The flat ``moe_*`` settings of a model: command-line flags, defaults, and their conversion to a ``MoEConfig``.

fairseq fills nested configuration groups from flags only for its own groups, so every setting here is a flat name. The
same name works as a flag (``--moe-top-k``), in YAML (``moe_top_k``) and in ``--model-overrides``. ``MoEConfig``
declares the settings of every layer, and each router its own. ``moe_settings`` reads them at every call, because a
``--user-dir`` package may register routers after this module was imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from .moe import MoEConfig
from .moe.config import LAYER_SETTINGS
from .moe.registry import LAYERS, router_settings
from .moe.settings import Setting, at_least_one

Place = tuple[str, int]

# Settings of the model itself: the places of its MoE layers, and the format of all other weights.
MODEL_SETTINGS = (
    Setting(
        *("interval", int, 2, "every n-th layer is a MoE layer (2: the second, fourth, ...)"),
        check=at_least_one,
        allowed="be at least 1; 2 makes every second layer a MoE layer",
    ),
    Setting("sides", str, "both", "which stacks have MoE layers", choices=("encoder", "decoder", "both")),
    Setting(
        *("linear_weights", str, "float"),
        "how all other linear maps and the embeddings are held; int8 is for inference and takes float checkpoints too",
        choices=("float", "int8"),
    ),
)


def moe_settings() -> dict[str, Setting]:
    """Every setting by its flat name: of the layers, of the model, and of the routers that are registered now."""
    of_layers = (setting for setting in LAYER_SETTINGS if setting.flat.startswith("moe_"))
    return {setting.flat: setting for setting in (*of_layers, *MODEL_SETTINGS, *router_settings().values())}


def argument_type(setting: Setting) -> Callable[[str], Any]:
    """The function for argparse's ``type``, whose name argparse puts into its error."""

    def parse(text: str) -> Any:
        return setting.parse(text)

    parse.__name__ = setting.kind.__name__ + (" or none" if setting.optional else "")
    return parse


def add_moe_args(parser: Any) -> None:
    """Add every ``--moe-*`` flag without defaults, which the architecture gives."""
    for setting in moe_settings().values():
        shown = "none" if setting.default is None else setting.default
        text = f"{setting.help} (XMoE: {shown})"
        if setting.per_layer:
            text = f"{setting.help}; one value, or one for each MoE layer (0.5,0.6,0.7): the encoder's first"
        if setting.kind is bool:
            parser.add_argument(setting.flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(setting.flag, type=argument_type(setting), choices=setting.choices, help=text)


def fill_moe_defaults(args: Any, **defaults: Any) -> None:
    """Give every setting that ``args`` lacks the default of the architecture, or else of XMoE.

    ``--moe-merge-experts`` given to an architecture of another method brings the router and the capacity it needs.
    """
    if getattr(args, "moe_merge_experts", False):
        defaults |= {f"moe_{name}": value for name, value in LAYERS["merged"].own_defaults.items()}
    for name, setting in moe_settings().items():
        if not hasattr(args, name):
            setattr(args, name, defaults.pop(name, setting.default))
        else:
            defaults.pop(name, None)
    if defaults:
        raise TypeError(f"not MoE settings: {sorted(defaults)}")


def check_moe_names(args: Any) -> None:
    """Refuse a misspelt ``moe_*`` name, which YAML and --model-overrides would otherwise drop silently."""
    names = args.keys() if hasattr(args, "keys") else vars(args).keys()
    known = moe_settings()
    unknown = sorted(name for name in names if str(name).startswith("moe_") and name not in known)
    if unknown:
        raise ValueError(
            f"unknown settings {', '.join(unknown)}; the moe_* settings are {', '.join(known)}. A router from outside "
            "the package brings its settings when its folder is the --user-dir"
        )


def moe_config(cfg: Any, *, side: str, layer_index: int, embed_dim: int, dense_dim: int) -> MoEConfig:
    """The configuration of layer ``layer_index`` (from 0) of ``side`` from a model's flat settings.

    ``cfg.moe_places``: from ``moe_places``.
    """
    values = {}
    for name, setting in moe_settings().items():
        value = getattr(cfg, name)
        if setting.per_layer:
            value = value_at(setting, value, cfg.moe_places, (side, layer_index))
        if setting.in_layer is not None:
            value = setting.in_layer(value, layer_index + (1000 if side == "decoder" else 0))
        values[setting.name] = value
    for setting in MODEL_SETTINGS:
        del values[setting.name]
    return MoEConfig(
        embed_dim=embed_dim,
        activation=str(cfg.activation_fn),
        activation_dropout=getattr(cfg, "activation_dropout", 0.0) or getattr(cfg, "relu_dropout", 0.0) or 0.0,
        dense_dim=dense_dim,
        **values,
    )


def is_moe_layer(cfg: Any, side: str, layer_index: int) -> bool:
    """True if layer ``layer_index`` (from 0) of ``side`` is a MoE layer."""
    for setting in MODEL_SETTINGS:
        setting.validate(getattr(cfg, setting.flat))
    return cfg.moe_sides in (side, "both") and (layer_index + 1) % cfg.moe_interval == 0


def moe_places(cfg: Any, sides: Sequence[str]) -> list[Place]:
    """(side, index in its stack) of every MoE layer, in the order of a list in a per-layer setting.

    Args:
        sides: the stacks that the model has, encoder before decoder.
    """
    return [
        (side, index)
        for side in sides
        for index in range(getattr(cfg, f"{side}_layers"))
        if is_moe_layer(cfg, side, index)
    ]


def value_at(setting: Setting, given: Any, places: Sequence[Place], place: Place) -> Any:
    """The value of a per-layer setting in one layer, from one value for all or a list with one for each.

    Raises: ValueError for a list without one value for each MoE layer.
    """
    if isinstance(given, str) or not hasattr(given, "__len__"):
        return given
    if len(given) != len(places):
        names = ", ".join(f"{side} {index}" for side, index in places)
        raise ValueError(
            f"{setting.flat} has {len(given)} values ({given}), but the model has {len(places)} MoE layers ({names}); "
            "give one for all layers, or one for each"
        )
    return given[list(places).index(place)]


def check_supported(args: Any) -> None:
    """Refuse fairseq options that a MoE layer cannot honour."""
    if getattr(args, "quant_noise_pq", 0):
        raise ValueError("--quant-noise-pq quantises dense FFN weights and does not reach experts; set it to 0")
    if getattr(args, "offload_activations", False):
        raise ValueError("--offload-activations does not work with MoE layers; --checkpoint-activations does")
