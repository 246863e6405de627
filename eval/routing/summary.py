"""The words of an analysis: a description of its model, and the problems that a reader should look at first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from eval.routing.layers import moe_layers
from eval.text.loading import Loaded
from xmoe_fairseq.checkpoints.structure import count_parameters
from xmoe_fairseq.moe.registry import router_class


def describe(loaded: Loaded) -> dict[str, Any]:
    """Describe the model and data of the figures."""
    model = vars(loaded.cfg.model) if hasattr(loaded.cfg.model, "__dict__") and "arch" in vars(loaded.cfg.model) else {}
    get = model.get if model else lambda name, default=None: getattr(loaded.cfg.model, name, default)
    layers = moe_layers(loaded.model)
    config = next(iter(layers.values())).config if layers else None
    return {
        "path": loaded.paths[0],
        "arch": get("arch") or get("_name"),
        "num_updates": loaded.num_updates,
        "num_parameters": count_parameters(loaded.model.state_dict())["total"],
        "num_moe_layers": len(layers),
        "router": config and config.router,
        "num_experts": config and config.num_experts,
        "expert_dim": config and config.expert_dim,
        "threshold": _threshold(layers) if config and config.router == "threshold" else None,
        "top_k": config and config.top_k,
        "router_settings": _router_settings(layers),
        "capacity_factor": config and config.capacity_factor,
        "eval_capacity_factor": config and config.eval_capacity_factor,
        "source_language": getattr(loaded.task.cfg, "source_lang", None),
        "target_language": getattr(loaded.task.cfg, "target_lang", None),
    }


def _router_settings(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Flat name -> value of the settings that the router declares; a list where the layers differ."""
    configs = [layer.config for layer in layers.values()]
    shown = {}
    for setting in router_class(configs[0].router).settings if configs else ():
        found = [getattr(config, setting.name) for config in configs]
        shown[setting.flat] = found[0] if all(value == found[0] for value in found) else found
    return shown


def _threshold(layers: Mapping[str, Any]) -> float | list[float]:
    """The threshold of all layers if it is one number, else a list of them."""
    found = [layer.config.threshold for layer in layers.values()]
    return found[0] if len(set(found)) == 1 else found


def problems(result: dict[str, Any]) -> list[str]:
    """Sentences about problems that a reader should look at first."""
    found = []
    for label, layer in result["layers"].items():
        dead, experts = len(layer["dead_experts"]), layer["num_experts"]
        if dead:
            found.append(
                f"{label}: {dead} of {experts} experts are dead: none of {layer['tokens']:,} tokens went to them"
                + (" (a collapsed layer; raise --balance-loss-weight)" if dead >= experts / 2 else "")
            )
        if layer["unserved"] > 0.05:
            found.append(f"{label}: {layer['unserved']:.0%} of the tokens got no expert at all")
        if not math.isfinite(layer["wanted"] + layer["entropy"]):
            found.append(f"{label}: the routing holds NaN")
    if not math.isfinite(result["quality"]["loss_bits"]):
        found.append("the loss on the test set is not a number")
    history = result.get("history") or {}
    if history.get("first_nan_update") is not None:
        found.append(f"the training loss stopped being a number at update {history['first_nan_update']}")
    return found


def finite(value: Any) -> Any:
    """The same value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
