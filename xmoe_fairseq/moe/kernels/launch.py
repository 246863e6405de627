"""Launch every kernel here, so that launches can be counted with their bytes and FLOPs.

``record()`` collects them. With ``dry=True`` nothing runs; shapes, launches and costs are known without a GPU, since no
step of the Triton way reads a value of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Cost:
    """The cost of a launch.

    Attributes:
        bytes: each operand read once, each result written once.
        tile_bytes: bytes that the programs load and store, where several programs may read one tile.
        flops: 2 per multiply-add of its matrix products.
    """

    bytes: float
    tile_bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, its constants, its cost."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    cost: Cost


@dataclass
class Record:
    """Launches in order; ``rows`` is the number of kept (token, expert) pairs for costs, None the static bound."""

    dry: bool
    rows: int | None
    launches: list[Launch] = field(default_factory=list)


_records: list[Record] = []
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
_MAX_INT32 = 2**31 - 1
# Before 3.3 a compiled kernel took no constants.
_HAS_TABLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


@contextmanager
def record(*, dry: bool = False, rows: int | None = None) -> Iterator[Record]:
    """Collect the launches of the block; ``dry``: do not run them (results are then uninitialised memory)."""
    kept = Record(dry, rows)
    _records.append(kept)
    try:
        yield kept
    finally:
        _records.remove(kept)


def reckoned_rows(bound: int) -> int:
    """Rows for costs: the recorder's number of kept pairs, else the static bound."""
    rows = _records[-1].rows if _records else None
    return bound if rows is None else min(rows, bound)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, cost: Callable[[], Cost] | None = None, **constants: Any
) -> None:
    """Run ``kernel`` over ``grid``; an empty grid runs nothing.

    Args:
        arguments: tensors and numbers in the order of the kernel's parameters, then ``constants`` in the same order,
            and ``num_warps``, ``num_stages`` among them.
        cost: called only while launches are recorded.
    """
    if 0 in grid:
        return
    if _records:
        for kept in _records:
            kept.launches.append(Launch(kernel.fn.__name__, grid, dict(constants), cost() if cost else Cost(0, 0)))
        if any(kept.dry for kept in _records):
            return
    if isinstance(kernel, InterpretedFunction):
        kernel[grid](*arguments, **constants)
    else:
        _run_compiled(kernel, grid, arguments, constants)


def _run_compiled(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Launch by a table of our own, since Triton's look-up costs the host several times as much as the launch.

    The key holds everything for which Triton compiles: constants, dtypes, alignment of pointers and of integers. A
    compiled kernel takes pointers as numbers, so that the driver is not asked about each.
    """
    device = arguments[0].device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run_compiled(kernel, grid, arguments, constants)
            return
    key: list[Any] = [id(kernel), device.index, *constants.values()]
    values: list[Any] = []
    for argument in arguments:
        if argument.__class__ is int:
            key.append(argument == 1 or (argument & 15, argument > _MAX_INT32))
            values.append(argument)
        elif argument.__class__ is float:
            values.append(argument)
        else:
            pointer = argument.data_ptr()
            key += (argument.dtype, pointer & 15)
            values.append(pointer)
    table_key = tuple(key)
    found = _compiled.get(table_key)
    if found is not None:
        compiled, parameters = found
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        compiled[(*grid, 1, 1)[:3]](*values, *parameters, stream=stream)
        return
    compiled = kernel[grid](*arguments, **constants)
    if _HAS_TABLE:
        _compiled[table_key] = (compiled, [constants[name] for name in kernel.arg_names if name in constants])
