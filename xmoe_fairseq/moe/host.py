"""Tell whether a tensor is in the CPU's memory, which decides between two ways of computing the same.

On a CPU NumPy sorts faster than torch, and reading a value to skip work is free. On another device reading a value
waits for the device, so the work is done without it. Tests replace ``on_cpu`` to run that way on CPU tensors.
"""

from __future__ import annotations

from torch import Tensor


def on_cpu(tensor: Tensor) -> bool:
    """True if ``tensor`` is in the memory of the CPU."""
    return tensor.device.type == "cpu"
