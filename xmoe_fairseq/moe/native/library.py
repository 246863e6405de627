"""Find the library, choose the instruction set once, and call it.

``XMOE_CPU_PATH`` (avx512_vnni, avx2, torch) overrules the choice, for comparisons.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .build import library_file

logger = logging.getLogger(__name__)
# Best first; ``torch``: without the library, or on a machine without AVX2.
PATHS = {"avx512_vnni": 2, "avx2": 1, "torch": 0}


@cache
def chosen_path() -> str:
    """The instruction set for few rows, chosen at the first call and logged.

    AMX machines take ``avx512_vnni``: few rows wait for memory, which tiles do not read faster.
    """
    usable = available_paths()
    wanted = os.environ.get("XMOE_CPU_PATH")
    if wanted is not None and wanted not in usable:
        raise ValueError(f"XMOE_CPU_PATH ({wanted!r}) must be one of {', '.join(usable)} on this machine")
    path = wanted or usable[0]
    hint = "" if _library() is not None else "; xmoe native makes a faster one"
    logger.info("few rows on the CPU: %s%s", path, hint)
    return path


def available_paths() -> list[str]:
    """The paths that this machine and this installation can run, best first."""
    library = _library()
    supported = 0 if library is None else library.xmoe_supported()
    return [name for name, number in PATHS.items() if not number or supported & number]


@cache
def _library() -> Any:
    file = library_file()
    if not file.exists():
        return None
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # this torch's OpenMP lacks GNU's interface
        logger.warning("%s cannot be loaded (%s): torch's own operators are used", file.name, error)
        return None


def call(name: str, path: str, *arguments: Tensor | int | None) -> None:
    """``xmoe_<name>`` with ``path`` in front and torch's number of threads at the end.

    Tensors become pointers; they must be contiguous, on the CPU and of the function's dtype. None is a null pointer.
    """
    values = [_as_c(argument) for argument in arguments]
    getattr(_library(), f"xmoe_{name}")(PATHS[path], *values, torch.get_num_threads())


def _as_c(argument: Tensor | int | None) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)
