"""Allow torch to load the few harmless types, beside tensors and plain data, that fairseq checkpoints hold.

torch >= 2.6 unpickles with ``weights_only=True``, so that no file can run code. That protection stays on, and these
types are added to its list.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch


def allow_checkpoint_types() -> None:
    """Let ``torch.load(..., weights_only=True)`` build these types; calling it again changes nothing."""
    multiarray = (getattr(np, "_core", None) or np.core).multiarray  # NumPy 1 has the second name alone
    dtypes = [type(np.dtype(number)) for number in (np.float64, np.float32, np.int64)]
    # the meters keep arrays, the counts behind --eval-bleu; NumPy's _reconstruct makes an empty array and runs no code
    torch.serialization.add_safe_globals(
        [argparse.Namespace, np.dtype, np.ndarray, multiarray.scalar, multiarray._reconstruct, *dtypes]
    )
