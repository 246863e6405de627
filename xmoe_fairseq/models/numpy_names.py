"""A name that fairseq 0.12 still asks NumPy for, in its language-model evaluation and in translation's ``num_tokens_vec``."""

from __future__ import annotations

import types

import numpy as np


def restore_numpy_names() -> None:
    """Give NumPy releases without ``numpy.compat`` its ``long``, which was ``int``; calling it again changes nothing."""
    if "compat" not in vars(np):
        np.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]
