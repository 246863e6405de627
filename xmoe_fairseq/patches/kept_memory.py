"""Keep freed memory in a process that trains on a CPU (`xmoe_fairseq/allocator.py` has why)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.trainer import Trainer

from ..allocator import ask_for_huge_pages, keep_freed_memory
from .wrap import wrap


def install() -> None:
    """Ask for huge pages now, before a model is built, and keep freed memory from the first trainer on."""
    ask_for_huge_pages()
    wrap(Trainer, "__init__", "kept-memory", _start)


def _start(original: Callable[..., None], trainer: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
    if cfg.common.cpu or not torch.cuda.is_available():
        keep_freed_memory()
    original(trainer, cfg, *args, **kwargs)
