"""Define a name that fairseq 0.12 still uses of NumPy, in evaluating language models and in ``num_tokens_vec``."""

from __future__ import annotations

import types

import numpy as np

from .wrap import INSTALLED


def install() -> None:
    """Give a NumPy without ``numpy.compat`` its ``long``, which was ``int``; a second call changes nothing."""
    if "compat" not in vars(np):
        vars(np)["compat"] = types.SimpleNamespace(long=int)
        INSTALLED["numpy-names"] = ["numpy.compat"]
