"""The source sentence as an argument of layers whose routing depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SentenceContext:
    """An argument of a merged layer in a decoder, beside its input.

    Attributes:
        vector_BD: float, one vector per row of the batch: the mean of the encoder's final output over the source
            tokens that are not padding. It must not depend on the target.
        cache: a dictionary that the caller keeps through one incremental decoding (and reorders with
            ``reorder_cache``); it holds the merged matrices. None: merge for this call alone.
    """

    vector_BD: Tensor
    cache: dict[str, Tensor] | None = None
