"""Mark the dummy batches that a rank gets when it has no batch left at the uneven end of an epoch.

fairseq multiplies their loss by zero, but a criterion that sums over ranks cannot tell them from real batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.trainer import Trainer

from .wrap import wrap


def install() -> None:
    """Give a dummy batch ``sample["is_dummy_batch"] = True``."""
    wrap(Trainer, "_prepare_sample", "marked-dummy-batches", _prepare_sample)


def _prepare_sample(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
    sample, is_dummy = original(trainer, *args, **kwargs)
    return ({**sample, "is_dummy_batch": True} if is_dummy else sample), is_dummy
