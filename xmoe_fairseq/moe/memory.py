"""Large CPU buffers that are used again instead of being mapped again.

A fresh buffer of 100 MB comes in 25,000 pages of 4 kB, each a fault of one to three microseconds: as long as the GEMM
that fills it. A step of training throws such buffers away and asks for them again (the gradients of the expert weights
alone are as large as the weights). Here they are kept: a buffer goes to the next who asks once nobody refers to it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from . import host

# Smaller ones the C library keeps by itself.
_LEAST_BYTES = 4 << 20
# A kept buffer serves requests down to this share of its size.
_LEAST_SHARE = 0.75
# A block of rows that stays in one core's second-level cache through a few elementwise passes.
_BLOCK_BYTES = 512 << 10


@dataclass
class _Buffer:
    """Bytes, the number of the request that used them last, and how many of them were ever handed out."""

    array: np.ndarray
    last_use: int = 0
    touched: int = 0

    def is_free(self) -> bool:
        # this object's reference and the argument's
        return sys.getrefcount(self.array) == 2


class BufferPool:
    """Memory for tensors, reused when the last tensor on it is gone.

    A buffer is a NumPy array; every tensor made on it holds a reference to the array, views and autograd's copies of
    the handle included, so the array's reference count says whether it is free. Buffers that lay idle while
    ``patience`` others were handed out are given back to the system.
    """

    def __init__(self, patience: int = 1000) -> None:
        self.patience = patience
        self._buffers: list[_Buffer] = []
        self._requests = 0
        self._lock = threading.Lock()

    def bytes_on(self, num_bytes: int) -> Tensor:
        """uint8 (num_bytes,), uninitialised."""
        with self._lock:
            self._requests += 1
            fitting = [
                buffer
                for buffer in self._buffers
                if num_bytes <= buffer.array.nbytes
                and buffer.array.nbytes * _LEAST_SHARE <= num_bytes
                and buffer.is_free()
            ]
            if fitting:
                chosen = min(fitting, key=lambda buffer: buffer.array.nbytes)
            else:
                self._forget_idle(self.patience)
                # the spare eighth serves a next batch of more rows; it is not mapped before it is touched
                chosen = _Buffer(np.empty(num_bytes + num_bytes // 8, dtype=np.uint8))
                self._buffers.append(chosen)
            chosen.last_use, chosen.touched = self._requests, max(chosen.touched, num_bytes)
            return torch.from_numpy(chosen.array)[:num_bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use or idle; what no tensor ever covered is not mapped, and not counted."""
        with self._lock:
            return sum(buffer.touched for buffer in self._buffers)

    def release(self) -> None:
        """Give every idle buffer back to the system."""
        with self._lock:
            self._forget_idle(patience=-1)

    def _forget_idle(self, patience: int) -> None:
        oldest = self._requests - patience
        self._buffers = [buffer for buffer in self._buffers if buffer.last_use >= oldest or not buffer.is_free()]


pool = BufferPool()


def empty(*shape: int, like: Tensor) -> Tensor:
    """Uninitialised tensor of ``like``'s dtype and device; a large one on a CPU comes from the pool."""
    num_bytes = prod(shape) * like.dtype.itemsize
    if not host.on_cpu(like) or num_bytes < _LEAST_BYTES:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return pool.bytes_on(num_bytes).view(like.dtype).view(shape)


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the first axis small enough for the cache on a CPU; one slice elsewhere, where launches cost more."""
    num_rows = rows.size(0)
    if not host.on_cpu(rows):
        yield slice(0, num_rows)
        return
    step = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
