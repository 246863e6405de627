"""Keep merged matrices through incremental decoding: one set per sentence of the batch, shared by its beams."""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts.stacked import Experts
from .gate import GateChoice
from .gemm import merge


def merged_for_decoding(
    experts: Experts, vector_RD: Tensor, choices: tuple[GateChoice, GateChoice], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The content of a cache: the sentence of each row, and the merged ``w1``, ``b1``, ``w2``, ``b2`` of each sentence.

    Args:
        vector_RD: input of the gates, equal for the beams of one sentence.
    """
    first_U, sentence_R = distinct_rows(vector_RD)
    cache = {"sentence_R": sentence_R}
    for number, choice in enumerate(choices, start=1):
        gate_UK, expert_UK = choice.gate_BK[first_U], choice.expert_BK[first_U]
        for name in (f"w{number}", f"b{number}"):
            cache[name] = merge(getattr(experts, name), gate_UK, expert_UK).to(dtype)
    return cache


def distinct_rows(vector_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Group equal rows, the beams of one sentence.

    Returns:
        int64 (U,): the first row of each sentence; int64 (R,): the sentence of each row.
    """
    sentences, sentence_R = torch.unique(vector_RD, dim=0, return_inverse=True)
    row_R = torch.arange(sentence_R.numel(), device=sentence_R.device)
    first_U = row_R.new_full((sentences.size(0),), sentence_R.numel())
    first_U = first_U.scatter_reduce(0, sentence_R, row_R, "amin")
    return first_U, sentence_R


def slots_by_sentence(sentence_R: Tensor, num_sentences: int) -> tuple[Tensor, int]:
    """int64 (R,): a slot for each row in groups of equal size, one group per sentence; and the size of a group."""
    count_U = torch.bincount(sentence_R, minlength=num_sentences)
    largest = int(count_U.max())
    order_R = torch.argsort(sentence_R, stable=True)
    start_U = count_U.cumsum(0) - count_U
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return sentence_R * largest + place_R - start_U[sentence_R], largest


def reorder_cache(cache: dict[str, Tensor], new_order: Tensor) -> None:
    """Reorder as a beam search does: row r becomes old row ``new_order[r]``; sentences without rows are removed."""
    if not cache:
        return
    kept_U, sentence_R = torch.unique(cache["sentence_R"].index_select(0, new_order), return_inverse=True)
    if kept_U.numel() < cache["w1"].size(0):
        for name in ("w1", "b1", "w2", "b2"):
            cache[name] = cache[name].index_select(0, kept_U)
    cache["sentence_R"] = sentence_R
