"""One question that decides between two ways of computing the same: does the host hold this tensor?

On the host NumPy sorts faster than torch, and looking at a value to save work costs nothing. Elsewhere looking means
waiting for the device, so the work is done without looking. Tests answer "no" for CPU tensors, to run the other way.
"""

from __future__ import annotations

from torch import Tensor


def on_cpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` lies in the memory of the CPU."""
    return tensor.device.type == "cpu"
