"""Make stock fairseq commands read and write checkpoints safely, on several ranks too, without editing fairseq.

Four functions of fairseq are wrapped at run time:

- Reading checks the checksums, and a refused or damaged file gets a clear message.
- Reading with --model-overrides also sets ``moe_*`` settings that the checkpoint does not hold. fairseq drops these
  without a message where the model was trained from a YAML.
- Resuming continues from the last good checkpoint of the folder if ``checkpoint_last.pt`` is damaged.
- Copying (``checkpoint1.pt`` to ``checkpoint_last.pt``) writes beside the target and then moves. fairseq copies in
  place, and a process that is killed meanwhile leaves half a file.
- Broadcasting what rank 0 read sends plain data. fairseq pickles its configuration object, which torch >= 2.6 refuses
  on the other side.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from omegaconf import DictConfig, OmegaConf, open_dict

from ..checkpoints.fallback import latest_good
from ..checkpoints.files import CheckpointError, refusal, verify_file
from ..checkpoints.structure import refuse_training_of_quantised
from ..files import write_aside
from .wrap import wrap

logger = logging.getLogger(__name__)
_resuming = False


def install() -> None:
    """Wrap the four functions."""
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", "checked-reading", _read_checked)
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", "new-overrides", _override_all)
    wrap(checkpoint_utils, "load_checkpoint", "last-good-checkpoint", _resume)
    wrap(distributed_utils, "_broadcast_object_slow", "plain-broadcast", _broadcast_plain)
    wrap(PathManager, "copy", "whole-copies", _copy_aside)


def _resume(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global _resuming
    _resuming = True
    try:
        return original(*args, **kwargs)
    finally:
        _resuming = False


def _read_checked(original: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return _read(original, path, *args, **kwargs)
    except CheckpointError as error:
        # All ranks' parts must come from one update, so only a file with the whole model may be replaced by an older
        # one.
        if not _resuming or Path(path).name != "checkpoint_last.pt":
            raise
        good = latest_good(Path(path).parent)
        logger.warning("%s", error)
        logger.warning("CONTINUING FROM %s, the last good checkpoint, instead of %s", good, path)
        return _read(original, str(good), *args, **kwargs)


def _read(original: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
    local_path = PathManager.get_local_path(path)
    verify_file(local_path)
    try:
        state = original(path, *args, **kwargs)
    except pickle.UnpicklingError as error:
        raise refusal(Path(path), error) from None
    if _resuming:
        refuse_training_of_quantised(state, path)
    return state


def _override_all(
    original: Callable[..., Any], path: str, arg_overrides: dict[str, Any] | None = None, *args: Any, **kwargs: Any
) -> Any:
    state = original(path, arg_overrides, *args, **kwargs)
    model = (state.get("cfg") or {}).get("model")
    if isinstance(model, DictConfig) and "moe_num_experts" in model:
        with open_dict(model):
            model.update({name: value for name, value in (arg_overrides or {}).items() if name.startswith("moe_")})
    return state


def _broadcast_plain(original: Callable[..., Any], obj: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(obj, dict) and isinstance(obj.get("cfg"), DictConfig):
        obj = {**obj, "cfg": OmegaConf.to_container(obj["cfg"], enum_to_str=True)}
    with torch.serialization.safe_globals([distributed_utils._TensorPlaceholder]):
        return original(obj, *args, **kwargs)


def _copy_aside(original: Callable[..., Any], src_path: str, dst_path: str, overwrite: bool = False) -> Any:
    if PathManager.path_requires_pathmanager(dst_path):
        return original(src_path, dst_path, overwrite)
    write_aside(dst_path, lambda partial: shutil.copyfile(src_path, partial))
    return os.fspath(dst_path)
