"""Change the settings that a checkpoint carries, so that stock fairseq commands build another model from them."""

from __future__ import annotations

import argparse
from typing import Any

from .files import State, without_optimizer
from .structure import model_settings


def flat_settings(state: State) -> dict[str, Any]:
    """The model's settings without fairseq's nested groups: ``encoder: {embed_dim: 8}`` is ``encoder_embed_dim``."""
    flat: dict[str, Any] = {}
    for name, value in model_settings(state).items():
        if name in ("encoder", "decoder", "quant_noise") and hasattr(value, "items"):
            flat.update({f"{name}_{inner}": inner_value for inner, inner_value in value.items() if inner != "_name"})
        else:
            flat[name] = value
    return flat


def converted(state: State, model: dict[str, Any], settings: dict[str, Any], arch: str, source: str) -> State:
    """A checkpoint of ``arch`` made from ``state``: new tensors and settings, no optimiser state.

    The optimiser state belongs to the tensors of the old model; ``--finetune-from-model`` trains on with a fresh one.
    """
    namespace = argparse.Namespace(**{**settings, "_name": arch, "arch": arch})
    new = {**without_optimizer(state), "model": model}
    if state.get("cfg"):
        new["cfg"] = {**state["cfg"], "model": namespace}
    else:
        new["args"] = namespace
    new["extra_state"] = {**(state.get("extra_state") or {}), "imported_from": source}
    return new


def with_model_settings(state: State, changes: dict[str, Any]) -> State:
    """A checkpoint for inference with the same weights and other settings of the model, e.g. ``moe_threshold``.

    Raises: CheckpointError if the checkpoint has no settings to change.
    """
    settings = argparse.Namespace(**{**model_settings(state), **changes})
    new = without_optimizer(state)
    if state.get("cfg"):
        return {**new, "cfg": {**state["cfg"], "model": settings}}
    return {**new, "args": settings}
