"""Let ``fairseq-train --cpu --bf16`` train: fairseq takes every ``--bf16`` without a GPU for a TPU and looks for one.

CPUs with AMX or AVX-512 bfloat16 train two to three times as fast in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer

from .wrap import wrap


def install() -> None:
    """Take back fairseq's guess of a TPU when ``--cpu`` was given."""
    wrap(Trainer, "__init__", "cpu-bfloat16", _start)


def _start(original: Callable[..., None], trainer: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
    if cfg.common.cpu and cfg.common.bf16:
        cfg.common.tpu = False
    original(trainer, cfg, *args, **kwargs)
