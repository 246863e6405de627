"""Exact orders with ties broken by index, without slow stable sorts.

A probability and the index that breaks its ties are packed into one int64 key, so that keys are unique and any sort
gives the same, right order. On a CPU NumPy's vectorised int64 sort is 30 times as fast as torch's stable sort of
floats (rows of 128); on other devices torch sorts the same keys.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import host

_MAX_BITS = 0x7FFFFFFF  # a float32 >= 0, read as an integer, orders as the float does and stays below this


def descending_key(score: Tensor) -> Tensor:
    """int64 in [0, 2^31) that ascends as ``score`` (float32 >= 0) descends."""
    return _MAX_BITS - score.contiguous().view(torch.int32).long()


def sort_descending(prob_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Each row from likeliest to least likely; ties go to the lower index.

    Args:
        prob_TE: float32 >= 0.
    Returns:
        sorted float32 (T, E) and int64 (T, E) indices.
    """
    num_experts = prob_TE.size(-1)
    index_bits = max(1, (num_experts - 1).bit_length())
    index_E = torch.arange(num_experts, device=prob_TE.device)
    key_TE = sort_last((descending_key(prob_TE) << index_bits) | index_E)
    sorted_TE = (_MAX_BITS - (key_TE >> index_bits)).int().view(torch.float32)
    return sorted_TE, key_TE & ((1 << index_bits) - 1)


def sort_last(key: Tensor) -> Tensor:
    """``key`` (int64, contiguous, overwritten on a CPU) sorted along its last axis, ascending."""
    if host.on_cpu(key):
        key.numpy().sort(axis=-1)
        return key
    return torch.sort(key, dim=-1).values


def flat_nonzero(mask: Tensor) -> Tensor:
    """int64: ascending flat positions where ``mask`` is True. On CUDA this is a host synchronisation."""
    if host.on_cpu(mask):
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask.reshape(-1)).squeeze(-1)


def count_indices(index: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """int64 (size,): how often each of 0 .. size - 1 stands in ``index`` (int64); where ``keep`` (bool), if given."""
    shown = (index if keep is None else torch.where(keep, index, size)).reshape(-1)
    if host.on_cpu(index):
        return torch.bincount(shown, minlength=size + 1)[:size]
    # bincount would wait for the device to learn the largest index
    return shown.new_zeros(size + 1).scatter_add_(0, shown, torch.ones_like(shown))[:size]
