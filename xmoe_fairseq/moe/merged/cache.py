"""Merged matrices that incremental decoding keeps: one set per sentence of the batch, shared by its beams.

R rows of a decoding batch (sentences x beams); U sentences that are kept merged.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distinct_rows(vector_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are bit for bit the same: the beams of one sentence.

    Returns:
        int64 (U,): the first row of each kind; int64 (R,): the kind of each row.
    """
    kinds, kind_R = torch.unique(vector_RC, dim=0, return_inverse=True)
    row_R = torch.arange(kind_R.numel(), device=kind_R.device)
    first_U = row_R.new_full((kinds.size(0),), kind_R.numel()).scatter_reduce(0, kind_R, row_R, "amin")
    return first_U, kind_R


def slots_by_sentence(sentence_R: Tensor, num_sentences: int) -> tuple[Tensor, int]:
    """A place for each row among equal-sized groups, one per sentence, and the size of a group."""
    count_U = torch.bincount(sentence_R, minlength=num_sentences)
    largest = int(count_U.max())
    order_R = torch.argsort(sentence_R, stable=True)
    start_U = count_U.cumsum(0) - count_U
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return sentence_R * largest + place_R - start_U[sentence_R], largest


def reorder_cache(cache: dict[str, Tensor], new_order: Tensor) -> None:
    """Follow a beam search: row r becomes the old row ``new_order[r]``; sentences that no row needs are forgotten."""
    if not cache:
        return
    kept_U, sentence_R = torch.unique(cache["sentence_R"].index_select(0, new_order), return_inverse=True)
    if kept_U.numel() < cache["w1"].size(0):
        for name in ("w1", "b1", "w2", "b2"):
            cache[name] = cache[name].index_select(0, kept_U)
    cache["sentence_R"] = sentence_R
