"""Large CPU buffers that are used again instead of being mapped again.

A fresh buffer of 100 MB comes in 25,000 pages of 4 kB, each a fault of one to three microseconds: as long as the GEMM
that fills it. A step of training throws such buffers away and asks for them again (the gradients of the expert weights
alone are as large as the weights). Here they are kept: a buffer goes to the next who asks once nobody refers to it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import Tensor

# Smaller ones the C library keeps by itself.
_LEAST_BYTES = 4 << 20
# A kept buffer serves requests down to this share of its size.
_LEAST_SHARE = 0.75
# A block of rows that stays in one core's second-level cache through a few elementwise passes.
_BLOCK_BYTES = 512 << 10


class BufferPool:
    """Memory for tensors, reused when the last tensor on it is gone.

    A buffer is a NumPy array; every tensor made on it holds a reference to the array, views and autograd's copies of
    the handle included, so the array's reference count says whether it is free. Buffers that lay idle while
    ``patience`` others were handed out are given back to the system.
    """

    def __init__(self, patience: int = 1000) -> None:
        self.patience = patience
        self._buffers: list[np.ndarray] = []
        self._last_use: list[int] = []
        self._requests = 0
        self._lock = threading.Lock()

    def bytes_on(self, num_bytes: int) -> Tensor:
        """uint8 (num_bytes,), uninitialised."""
        with self._lock:
            self._requests += 1
            chosen = -1
            for index in range(len(self._buffers)):
                size = self._buffers[index].nbytes
                fits = num_bytes <= size and size * _LEAST_SHARE <= num_bytes
                if fits and self._is_free(index) and (chosen < 0 or size < self._buffers[chosen].nbytes):
                    chosen = index
            if chosen < 0:
                self._forget_idle(self.patience)
                self._buffers.append(np.empty(num_bytes + num_bytes // 8, dtype=np.uint8))
                self._last_use.append(0)
                chosen = len(self._buffers) - 1
            self._last_use[chosen] = self._requests
            return torch.from_numpy(self._buffers[chosen])[:num_bytes]

    @property
    def nbytes(self) -> int:
        """Bytes held, in use or idle."""
        with self._lock:
            return sum(buffer.nbytes for buffer in self._buffers)

    def release(self) -> None:
        """Give every idle buffer back to the system."""
        with self._lock:
            self._forget_idle(patience=-1)

    def _is_free(self, index: int) -> bool:
        # the list's reference and the argument's
        return sys.getrefcount(self._buffers[index]) == 2

    def _forget_idle(self, patience: int) -> None:
        stale = [
            index
            for index in range(len(self._buffers))
            if self._is_free(index) and self._requests - self._last_use[index] > patience
        ]
        for index in reversed(stale):
            del self._buffers[index], self._last_use[index]


pool = BufferPool()


def empty(*shape: int, like: Tensor) -> Tensor:
    """Uninitialised tensor of ``like``'s dtype and device; a large one on a CPU comes from the pool."""
    num_bytes = prod(shape) * like.dtype.itemsize
    if like.device.type != "cpu" or num_bytes < _LEAST_BYTES:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return pool.bytes_on(num_bytes).view(like.dtype).view(shape)


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the first axis small enough for the cache on a CPU; one slice elsewhere, where launches cost more."""
    num_rows = rows.size(0)
    if rows.device.type != "cpu":
        yield slice(0, num_rows)
        return
    step = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
