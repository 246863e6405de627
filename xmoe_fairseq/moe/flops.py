"""Counted FLOPs: torch's counter, with a formula for the grouped GEMM, which it counts as 0 by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _grouped_gemm_flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """2 per multiply-add of ``aten._grouped_mm``, from shapes alone.

    Groups are ranges of the rows, the columns or the summed axis of a 2-D operand, or a batch axis of both. In each
    case an element of the 2-D operand is multiplied with one group's matrix.
    """
    if len(left) == 2:  # (A, I) x (E, I, O), or a weight gradient (I, A) x (A, O)
        return 2 * left[0] * left[1] * right[-1]
    if len(right) == 2:  # (E, O, I) x (I, A)
        return 2 * left[-2] * right[0] * right[1]
    return 2 * left[0] * left[1] * left[2] * right[-1]


def counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products that calling ``run`` performs, backward passes inside it included.

    2 per multiply-add, as everywhere in this package. Elementwise work, gathers and sums are not counted. The bmm path
    multiplies its padding rows and the masked path every (token, expert) pair, and these count.
    """
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)
    counter = FlopCounterMode(display=False, custom_mapping={grouped: _grouped_gemm_flops} if grouped else {})
    with counter:
        run()
    return counter.get_total_flops()
