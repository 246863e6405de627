"""Let ``fairseq-train --cpu --bf16`` train; fairseq looks for a TPU for every ``--bf16`` without a GPU.

CPUs with AMX or AVX-512 bfloat16 train two to three times as fast in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer

from .wrap import wrap


def install() -> None:
    """Set ``tpu`` back to False when ``--cpu`` was given."""
    wrap(Trainer, "__init__", "cpu-bfloat16", _start)


def _start(original: Callable[..., None], trainer: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
    if cfg.common.cpu and cfg.common.bf16:
        cfg.common.tpu = False
    original(trainer, cfg, *args, **kwargs)
