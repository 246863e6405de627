"""One checkpoint, ready for inference, with the task it was trained for."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from torch import nn

from xmoe_fairseq.moe import MoELayer


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device.

    Attributes:
        num_updates: updates it was trained for; None where the file does not tell (averages, exports).
    """

    path: str
    model: nn.Module
    task: Any
    cfg: Any
    num_updates: int | None
    device: torch.device

    @property
    def is_translation(self) -> bool:
        return getattr(self.task, "target_dictionary", None) is not None and hasattr(self.model, "encoder")


def load(
    path: str,
    *,
    data: str,
    user_dir: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Loaded:
    """Load a checkpoint of fairseq.

    Args:
        path: the checkpoint.
        data: folder of fairseq-preprocess, for its dictionaries and test sets.
        user_dir: package with models beyond fairseq's.
        overrides: settings to change, as fairseq's --model-overrides.
        device: "cpu", "cuda"; None: the first GPU if there is one.
    Raises:
        FileNotFoundError, or ValueError for a file that is no checkpoint, does not fit, or holds NaN.
    """
    for name, place in (("checkpoint", Path(path)), ("data", Path(data))):
        if not place.exists():
            raise FileNotFoundError(f"{name}: no such file or folder: {path if name == 'checkpoint' else data}")
    if user_dir is not None:
        utils.import_user_module(Namespace(user_dir=user_dir))
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path, {"data": data, **(overrides or {})})
        history = state.get("optimizer_history") or [{}]
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], state=state)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a checkpoint, or one with types that torch's load protection refuses; "
            "give the --user-dir that allows them (xmoe_fairseq does)"
        ) from None
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{path}: not a whole checkpoint, or not one for the dictionaries in {data} ({reason})"
        ) from None
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = models[0].eval().to(chosen)
    _check_finite(path, model)
    return Loaded(path, model, task, cfg, history[-1].get("num_updates"), chosen)


def _check_finite(path: str, model: nn.Module) -> None:
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} tensors hold NaN or infinity (the first: {broken[0]}), so it routes nothing "
            "sensibly; take an earlier checkpoint, and look for the update at which the training loss became NaN"
        )


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Module name -> MoE layer, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
