"""Export a model to a folder with ``model.safetensors``, ``config.json`` and a model card, and import it again.

safetensors holds tensors alone, so that reading it cannot run code. Tied tensors are stored once and tied again by the
import. Absolute paths of the training machine are left out of the configuration.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import sha256_of, write_aside
from .files import CheckpointError, CorruptCheckpointError, State, num_updates
from .model_card import model_card
from .settings import flat_settings
from .structure import check_structure, count_parameters, describe_method

FORMAT = "xmoe_fairseq/1"
_GROUPS = ("model", "task", "criterion")  # files that fairseq-generate and a fresh training read


def export_safetensors(state: State, folder: str | Path) -> Path:
    """Write the three files; ``config.json`` comes last and carries the checksum of the tensors.

    An export in ``folder`` is replaced, but not its README.md, which its owner may have filled in.

    Raises:
        CheckpointError: no settings, tensors that are not those the settings ask for, or a config.json in ``folder``
            that is no export's.
        OSError: a file could not be written.
    """
    check_structure(state)
    folder = Path(folder)
    tensors, tied = _untied(state["model"])
    tensor_file, config_file, card = (folder / name for name in ("model.safetensors", "config.json", "README.md"))
    if config_file.exists():
        _read_config(config_file)

    def write(partial: Path) -> None:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors makes files that their owner alone can read

    write_aside(tensor_file, write)
    config = _config(state, tied, sha256_of(tensor_file))
    if not card.exists():
        _write_text(card, model_card(config))
    _write_text(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def import_safetensors(folder: str | Path) -> State:
    """The checkpoint of an exported folder, with tensors equal bit for bit and without optimiser state.

    Raises:
        CheckpointError: a file is missing or is not of this format.
        CorruptCheckpointError: the tensors are not those that were exported.
        MissingExpertError, WrongSizeError: the tensors are not those its configuration asks for.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    tensor_file = folder / "model.safetensors"
    if not tensor_file.is_file():
        raise CheckpointError(f"{tensor_file} is missing; an exported model is a folder with it and config.json")
    if sha256_of(tensor_file) != config["sha256"]:
        raise CorruptCheckpointError(f"{tensor_file}: its sha256 is not that of config.json; copy both again")
    try:
        model = load_file(tensor_file)
    except SafetensorError as error:
        raise CorruptCheckpointError(f"{tensor_file}: {error}; export it again") from None
    for name, source in config["tied"].items():
        model[name] = model[source]
    state = _state(config, model)
    check_structure(state, folder)
    return state


def _untied(model: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and the names that share another name's tensor."""
    first: dict[Any, str] = {}
    tensors, tied = {}, {}
    for name, tensor in model.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        tensors[name] = tensor.contiguous()
    return tensors, tied


def _config(state: State, tied: dict[str, str], checksum: str) -> dict[str, Any]:
    settings, extra = flat_settings(state), state.get("extra_state") or {}
    groups = {name: _plain(state["cfg"].get(name)) for name in _GROUPS} if state.get("cfg") else {}
    counts = count_parameters(state["model"])
    return {
        "format": FORMAT,
        "method": describe_method(settings),
        "cfg": {**groups, "model": _plain(settings)},
        "num_updates": num_updates(state),
        "score": _plain(extra.get("val_loss")),
        "parameters": counts["total"],
        "expert_parameters": counts["experts"],
        "tied": tied,
        "sha256": checksum,
    }


def _plain(value: Any) -> Any:
    """The value in JSON's types; absolute paths become None."""
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if hasattr(value, "items"):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return None if Path(value).is_absolute() else value
    if value is None or isinstance(value, (bool, int)):
        return value
    number = float(value)  # NumPy's numbers too
    if not math.isfinite(number):
        raise CheckpointError(f"the settings hold {number}, which JSON cannot")
    return number


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; an exported model is a folder with it and model.safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; this package's export_safetensors writes that")
    return config


def _state(config: dict[str, Any], model: dict[str, Tensor]) -> State:
    cfg = {**config["cfg"], "model": argparse.Namespace(**config["cfg"]["model"])}
    history = {
        "criterion_name": "none",
        "optimizer_name": "none",
        "lr_scheduler_state": {},
        "num_updates": config["num_updates"],
    }
    return {
        "args": None,
        "cfg": cfg,
        "model": model,
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 0},
            "val_loss": config["score"],
        },
        "last_optimizer_state": None,
    }


def _write_text(path: Path, text: str) -> None:
    write_aside(path, lambda partial: partial.write_text(text, encoding="utf-8"))
