"""The C library's allocator, set once for a process that trains on a CPU, so that freed memory is used again.

By default glibc maps every large buffer afresh and gives it back when it is freed. A buffer of 100 MB then costs 25,000
page faults each time, as long as the GEMM that fills it, and a training step frees and asks for many of them: the
gradients of the expert weights alone are as large as the weights. Two settings keep freed memory in the process.
"""

from __future__ import annotations

import ctypes

# The parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next request; call it once, where training starts.

    The process then holds its highest use until it ends, whoever allocated it. Results do not change.

    Returns:
        True if the allocator took the settings; False, with nothing changed, where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  other C libraries may define mallopt with other numbers
        mallopt = libc.mallopt
    except (OSError, TypeError, AttributeError):
        return False
    # large requests come from the heap instead of fresh mappings, and the heap's free top is not given back
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
