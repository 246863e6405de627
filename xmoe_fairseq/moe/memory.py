"""Large CPU buffers without the price of small pages.

A fresh buffer of 100 MB is mapped in 25,000 pages of 4 kB, each a fault of one to two microseconds: as long as the GEMM
that fills it. Linux maps it in 2 MB pages when asked to (``madvise``), which makes those faults vanish. It is asked
here, for buffers of this package only; where the system has no such pages nothing changes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
# A block of rows that stays in one core's second-level cache through a few elementwise passes.
_BLOCK_BYTES = 512 << 10


@lru_cache(maxsize=1)
def _madvise():  # type: ignore[no-untyped-def]
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty(*shape: int, like: Tensor) -> Tensor:
    """Uninitialised tensor of ``like``'s dtype and device; on a CPU backed by large pages when it is large."""
    buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
    if buffer.device.type == "cpu" and buffer.nbytes >= 2 * _HUGE_PAGE and _madvise() is not None:
        first = -(-buffer.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        length = (buffer.data_ptr() + buffer.nbytes - first) // _HUGE_PAGE * _HUGE_PAGE
        _madvise()(first, length, _MADV_HUGEPAGE)  # advice: a refusal leaves ordinary pages
    return buffer


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the first axis small enough for the cache on a CPU; one slice elsewhere, where launches cost more."""
    num_rows = rows.size(0)
    if rows.device.type != "cpu":
        yield slice(0, num_rows)
        return
    step = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
