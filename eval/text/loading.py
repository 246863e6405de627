"""Load checkpoints for inference with the task they were trained for; all of eval/ loads its models here."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import nn


@dataclass(frozen=True)
class Loaded:
    """Models in eval mode on their device.

    Attributes:
        paths, models: a file and its model each; several make an ensemble.
        num_updates: updates of the first model; None if its file does not tell (averages, exports).
    """

    paths: tuple[str, ...]
    models: tuple[nn.Module, ...]
    task: Any
    cfg: Any
    num_updates: int | None
    device: torch.device

    @property
    def model(self) -> nn.Module:
        """The first model, for analyses of a single one."""
        return self.models[0]

    @property
    def is_translation(self) -> bool:
        return getattr(self.task, "target_dictionary", None) is not None and hasattr(self.model, "encoder")


def load(
    *paths: str | os.PathLike[str],
    data: str,
    languages: tuple[str, str] | None = None,
    user_dir: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Loaded:
    """Load one checkpoint of fairseq, or an ensemble.

    Args:
        paths: the checkpoints.
        data: folder of fairseq-preprocess, for its dictionaries and test sets.
        languages: source and target of a translation; None takes the task that the checkpoint was trained for.
        user_dir: package with models beyond fairseq's.
        overrides: settings to change, as fairseq's --model-overrides.
        device: "cpu", "cuda"; None: the first GPU if there is one.
    Raises:
        FileNotFoundError, or ValueError for a file that is no checkpoint, does not fit, or holds NaN.
    """
    names = tuple(os.fspath(path) for path in paths)
    for what, place in (*(("checkpoint", name) for name in names), ("data", data)):
        if not Path(place).exists():
            raise FileNotFoundError(f"{what}: no such file or folder: {place}")
    chosen = _device(device)
    if user_dir is not None:
        utils.import_user_module(Namespace(user_dir=user_dir))
    task = None if languages is None else _translation(data, languages)
    shown = ", ".join(names)
    changes = {"data": data, **(overrides or {})}
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(names[0], changes)
        history = state.get("optimizer_history") or [{}]
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            list(names), arg_overrides=changes, task=task, state=state
        )
    except pickle.UnpicklingError:
        raise ValueError(
            f"{shown}: not a checkpoint, or one with types that torch's load protection refuses; "
            "give the --user-dir that allows them (xmoe_fairseq does)"
        ) from None
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{shown}: {_explain(data, error)}") from None
    _check_languages(shown, cfg, languages)
    on_device = tuple(model.eval().to(chosen) for model in models)
    for name, model in zip(names, on_device, strict=True):
        _check_finite(name, model)
    return Loaded(names, on_device, task, cfg, history[-1].get("num_updates"), chosen)


def _device(name: str | None) -> torch.device:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = torch.device(name or ("cuda" if found else "cpu"))
    if chosen.type == "cuda" and (chosen.index or 0) >= found:
        raise ValueError(f"--device {name}: torch sees {found} GPUs; take cpu, or auto")
    return chosen


def _translation(data: str, languages: tuple[str, str]) -> TranslationTask:
    source, target = languages
    return TranslationTask.setup_task(TranslationConfig(data=data, source_lang=source, target_lang=target))


def _check_languages(shown: str, cfg: Any, languages: tuple[str, str] | None) -> None:
    trained = (cfg.task.source_lang, cfg.task.target_lang) if languages else None
    if trained and None not in trained and trained != languages:  # None if fairseq-train found the languages by itself
        raise ValueError(f"{shown}: trained for {'-'.join(trained)}, asked for {'-'.join(languages)}")


def _explain(data: str, error: Exception) -> str:
    text = str(error)
    if "size mismatch" in text or "Missing key" in text or "Unexpected key" in text:
        return f"does not fit the dictionaries in {data} or the overrides ({' '.join(text.split())[:400]})"
    first_line = (text.strip() or type(error).__name__).splitlines()[0]
    return f"not a checkpoint, truncated or corrupted ({first_line})"


def _check_finite(path: str, model: nn.Module) -> None:
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} tensors hold NaN or infinity (the first: {broken[0]}), so it routes nothing "
            "sensibly; take an earlier checkpoint, and look for the update at which the training loss became NaN"
        )
