"""Set how the C library hands out memory, once for a process that computes on a CPU.

By default glibc maps every large buffer afresh and gives it back when it is freed, and the kernel fills it 4 kB at a
time. A buffer of 100 MB then costs 25,000 page faults for each allocation, and a training step allocates and frees
many: the gradients of the expert weights alone are as large as the weights. These settings change no result, and a bare
``import xmoe_fairseq.moe`` does not make them. docs/scaling.md has the measurements.
"""

from __future__ import annotations

import ctypes
import os
import sys

# The parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER_TRIM = -1


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next request; call it once, where training or a benchmark starts.

    The process then holds its highest use of memory until it ends.

    Returns:
        True if the allocator took the settings; False, with nothing changed, where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  other C libraries may number mallopt's parameters differently
        mallopt = libc.mallopt
    except (OSError, TypeError, AttributeError):
        return False
    # large requests come from the heap instead of fresh mappings, and the free top of the heap is not given back
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))


def ask_for_huge_pages() -> None:
    """Let torch align large buffers and ask the kernel for pages of 2 MB (Linux); a value that is set already stays.

    torch reads the variable at its first large allocation, so this comes before a model is built.
    """
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
