"""Refuse settings that nothing reads, such as a misspelt name in a YAML or in ``xmoe run --set``.

fairseq-hydra-train refuses unknown names in a YAML's plain groups and in those with a dataclass. It takes any name in
the group of a model without one, as the transformers are, and any name that is added with ``++``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from .wrap import wrap

# Keys that fairseq adds to what the user gave.
_ADDED = {"_name", "arch", "job_logging_cfg"}


def install() -> None:
    """Wrap the trainer's constructor."""
    wrap(Trainer, "__init__", "known-settings", _start)


def _start(original: Callable[..., None], trainer: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
    if OmegaConf.is_config(cfg):
        check_known(cfg)
    original(trainer, cfg, *args, **kwargs)


def check_known(cfg: Any) -> None:
    """Raise ValueError if ``cfg`` (fairseq's, as hydra composed it) holds a group or a name that nothing reads."""
    known = known_names(cfg)
    given = [*cfg.keys()]
    for group in known.keys() & cfg.keys():
        given += [f"{group}.{name}" for name in cfg[group]]
    names = {*known, *(f"{group}.{name}" for group, inner in known.items() for name in inner)}
    names |= {field.name for field in dataclasses.fields(FairseqConfig)}
    unknown = [name for name in given if name not in names and name.rpartition(".")[2] not in _ADDED]
    if unknown:
        close = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {close[0]}?" if close else "leave them out"
        raise ValueError(f"settings that nothing reads: {', '.join(sorted(unknown))}; {hint}")


def known_names(cfg: Any) -> dict[str, set[str]]:
    """The names of each group that fairseq does not check by itself."""
    plain = {field.name: field.default for field in dataclasses.fields(FairseqConfig)}
    known = {
        group: {field.name for field in dataclasses.fields(default)} - _ADDED
        for group, default in plain.items()
        if dataclasses.is_dataclass(default) and OmegaConf.is_config(cfg.get(group))
    }
    if OmegaConf.is_config(cfg.model) and (names := _names_of_transformer(cfg.model.get("_name"))):
        known["model"] = names
    return known


def _names_of_transformer(arch: str | None) -> set[str]:
    """Flags of a transformer and what its architecture sets; empty for models that fairseq or others check."""
    model = ARCH_MODEL_REGISTRY.get(arch)
    if arch in MODEL_DATACLASS_REGISTRY or model is None:
        return set()
    if not issubclass(model, (TransformerModelBase, TransformerLanguageModel)):
        return set()
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    model.add_args(parser)
    settings = Namespace()
    ARCH_CONFIG_REGISTRY[arch](settings)
    names = {action.dest for action in parser._actions} | vars(settings).keys()
    if issubclass(model, TransformerLanguageModel):  # fields without a flag, which the task fills
        names |= {field.name for field in dataclasses.fields(TransformerLanguageModelConfig)}
    return names - _ADDED
