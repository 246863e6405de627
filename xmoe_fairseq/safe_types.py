"""The few harmless types, beside tensors and plain data, that fairseq checkpoints hold.

torch >= 2.6 unpickles with ``weights_only=True``: nothing in a file may run code. That protection stays on; these types
are added to its list.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch


def allow_checkpoint_types() -> None:
    """Let ``torch.load(..., weights_only=True)`` build these types; calling it again changes nothing."""
    multiarray = getattr(np, "_core", None) or np.core  # NumPy 1 has the second name only
    torch.serialization.add_safe_globals(
        [argparse.Namespace, np.dtype, multiarray.multiarray.scalar, type(np.dtype(np.float64))]
    )
