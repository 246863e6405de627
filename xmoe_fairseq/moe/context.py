"""What a layer may need to know of the sentence beside its input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SentenceContext:
    """What a decoder's merged layer needs beside its input.

    Attributes:
        vector_BC: float, one vector per row of the batch: the mean of the encoder's final output over the source
            tokens that are not padding. It must not depend on the target.
        cache: a dictionary that the caller keeps through one incremental decoding (and reorders with
            ``reorder_cache``); merged matrices stay in it. None: merge for this call alone.
    """

    vector_BC: Tensor
    cache: dict[str, Tensor] | None = None
