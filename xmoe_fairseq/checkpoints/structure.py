"""Read settings, MoE layers and parameters of a checkpoint, and check its tensors against its settings."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from ..moe.registry import LAYERS, ROUTERS
from ..moe_args import moe_config, moe_settings
from .files import CheckpointError, State

Shape = tuple[int, ...]


class MissingExpertError(CheckpointError):
    """A MoE layer lacks some or all of its experts."""


class WrongSizeError(CheckpointError):
    """A tensor has another shape than the checkpoint's own settings give it."""


def model_settings(state: State) -> dict[str, Any]:
    """The model's flat settings, from ``cfg`` (fairseq >= 0.10) or ``args``.

    Raises:
        CheckpointError: the checkpoint has neither.
    """
    cfg = state.get("cfg")
    settings = cfg["model"] if cfg else state.get("args")
    if settings is None:
        raise CheckpointError("the checkpoint holds neither cfg nor args, so nothing says what its model is")
    return dict(settings) if hasattr(settings, "keys") else dict(vars(settings))


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with the default of every ``moe_*`` setting it lacks, if it is a MoE model's."""
    if "moe_num_experts" not in settings:
        return settings
    return {**{name: setting.default for name, setting in moe_settings().items()}, **settings}


def moe_layers(state: State) -> list[tuple[str, int]]:
    """(side, layer index) of every layer that the settings make a MoE layer; none for a dense model."""
    settings = with_defaults(model_settings(state))
    if "moe_num_experts" not in settings:
        return []
    sides = [side for side in ("encoder", "decoder") if settings["moe_sides"] in (side, "both")]
    present = [side for side in sides if any(name.startswith(f"{side}.layers.") for name in state["model"])]
    interval = settings["moe_interval"]
    return [
        (side, index) for side in present for index in range(settings[f"{side}_layers"]) if (index + 1) % interval == 0
    ]


def check_structure(state: State, path: Any = "the checkpoint") -> None:
    """Compare the feed-forward and MoE tensors with the checkpoint's own settings.

    Raises:
        MissingExpertError, WrongSizeError: with the tensor, what it is and what it should be.
    """
    settings, model = with_defaults(model_settings(state)), state["model"]
    moe = moe_layers(state)
    for side, index in moe:
        for name, shape in _moe_shapes(settings, moe, (side, index), path).items():
            _check_tensor(model, f"{side}.layers.{index}.moe.{name}", shape, path)
    for side in ("encoder", "decoder"):
        for index in range(settings.get(f"{side}_layers") or 0):
            name = f"{side}.layers.{index}.fc1.weight"
            if (side, index) not in moe and name in model:
                shape = (settings[f"{side}_ffn_embed_dim"], settings[f"{side}_embed_dim"])
                _require_shape(name, model[name], shape, path)


def _moe_shapes(
    settings: dict[str, Any], places: list[tuple[str, int]], place: tuple[str, int], path: Any
) -> dict[str, Shape]:
    """Name -> shape of the tensors of one MoE layer; those of its router only if the router is registered."""
    side, index = place
    known = settings["moe_router"] in ROUTERS
    view = argparse.Namespace(**{**settings, "moe_places": places, **({} if known else {"moe_router": "switch"})})
    widths = {"embed_dim": settings[f"{side}_embed_dim"], "dense_dim": settings[f"{side}_ffn_embed_dim"]}
    try:
        config = moe_config(view, side=side, layer_index=index, **widths)
    except ValueError as error:
        raise CheckpointError(f"{path}: its settings are those of no model: {error}") from None
    shapes = LAYERS[config.layer_kind].state_shapes(config)
    return {name: shape for name, shape in shapes.items() if known or not name.startswith("router.")}


def _check_tensor(model: dict[str, Tensor], name: str, shape: Shape, path: Any) -> None:
    if name not in model:
        raise MissingExpertError(f"{path}: {name} is missing; the settings ask for {shape}. Take the whole checkpoint")
    found = tuple(model[name].shape)
    if ".experts." in name and found[1:] == shape[1:] and found[0] < shape[0]:
        raise MissingExpertError(
            f"{path}: {name} holds {found[0]} of {shape[0]} experts; is it one rank's part of an expert-parallel "
            "model? Take the consolidated checkpoint"
        )
    _require_shape(name, model[name], shape, path)


def _require_shape(name: str, tensor: Tensor, shape: Shape, path: Any) -> None:
    if tuple(tensor.shape) != shape:
        raise WrongSizeError(
            f"{path}: {name} is {tuple(tensor.shape)}, its own settings make it {shape}; the file mixes two models"
        )


# Ends of the names of tensors that may be tied, and of fairseq's buffers that are no parameters.
_EMBEDDINGS = ("embed_tokens.weight", "output_projection.weight")
_BUFFERS = (".version", "._float_tensor")


def count_parameters(model: dict[str, Tensor]) -> dict[str, int]:
    """Sizes of the model's parameters: ``total``, and ``experts`` among them. Tied tensors count once.

    Tensors in the same memory are tied, and so are equal embeddings, of which a checkpoint from a GPU holds copies.
    """
    seen, counts = set(), {"total": 0, "experts": 0}
    embeddings: list[Tensor] = []
    for name, tensor in model.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        is_number = tensor.is_floating_point() or tensor.dtype == torch.int8
        if place in seen or not is_number or is_scale(name, model) or f".{name}".endswith(_BUFFERS):
            continue
        seen.add(place)
        if name.endswith(_EMBEDDINGS):
            if any(tensor.shape == other.shape and torch.equal(tensor, other) for other in embeddings):
                continue
            embeddings.append(tensor)
        counts["total"] += tensor.numel()
        counts["experts"] += tensor.numel() if "expert" in name else 0
    return counts


def is_scale(name: str, model: dict[str, Tensor]) -> bool:
    """True if ``name`` holds the scales of an int8 tensor: ``scale`` beside ``q``, ``scale1`` beside ``q1``."""
    parent, _, last = name.rpartition(".")
    return last.startswith("scale") and f"{parent}.q{last.removeprefix('scale')}" in model


def describe_weights(settings: dict[str, Any]) -> str:
    """The format of the weights: float, or which of them are int8 or bfloat16."""
    if (settings.get("arch") or settings.get("_name")) == "int8_transformer":
        return "linear maps and embeddings int8; for inference"
    parts = [
        f"{what} {settings[name]}"
        for name, what in (("moe_weights", "experts"), ("moe_linear_weights", "linear maps and embeddings"))
        if settings.get(name, "float") != "float"
    ]
    return ", ".join(parts) + "; for inference" if parts else "float"


def refuse_training_of_quantised(state: State, path: Any) -> None:
    """Raise CheckpointError if ``state`` holds quantised weights."""
    held = describe_weights(model_settings(state))
    if held != "float":
        raise CheckpointError(
            f"{path}: {held}: it cannot be trained, continued or finetuned; train the float checkpoint that it was "
            "made of and quantise the result (xmoe checkpoint quantise)"
        )


def describe_method(settings: dict[str, Any]) -> str:
    """One line about the routing method and its sizes, or the dense FFN."""
    if "moe_num_experts" not in settings:
        if "num_experts" in settings and "moe_type" in settings:
            return f"official fork's {settings['moe_type']} router; xmoe checkpoint import-official"
        return f"dense FFN {settings.get('encoder_ffn_embed_dim') or settings.get('decoder_ffn_embed_dim')}"
    settings = with_defaults(settings)
    parts, known = ["merged experts" if settings["moe_merge_experts"] else settings["moe_router"]], moe_settings()
    parts.append(f"{settings['moe_num_experts']} experts of {settings['moe_expert_dim']}")
    router = ROUTERS.get(settings["moe_router"])
    described = [setting.describe(settings[setting.flat]) for setting in (router.settings if router else ())]
    parts += [text for text in described if text]
    # of a router that is registered by a package of the user's own, and not here
    parts += [f"{name} {value}" for name, value in settings.items() if name.startswith("moe_") and name not in known]
    parts.append(f"gamma {settings['moe_capacity_factor']} (inference {settings['moe_eval_capacity_factor']})")
    parts.append(f"sides {settings['moe_sides']}, every {settings['moe_interval']} layers")
    return ", ".join(parts)
