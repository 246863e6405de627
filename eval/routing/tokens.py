"""Group tokens without a model, by kind, frequency and place in the sentence.

Axis letters: V vocabulary, B sentences, T tokens of a time-major flattened batch (row t * B + b, as the layers see it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("word start", "continuation", "punctuation", "digits", "special")
# Bands of occurrences in the analysed set, by powers of four.
FREQUENCIES = ("1-3", "4-15", "16-63", "64-255", "256-1023", "1024-4095", "4096 and more")
TENTHS = tuple(f"{start}-{start + 10}%" for start in range(0, 100, 10))
NUM_COMMON = 512  # the most frequent tokens, for which each expert's share is kept

_START_MARK, _JOINER = "\u2581", "@@"


@dataclass(frozen=True)
class Vocabulary:
    """Tables by token id, on the model's device.

    Attributes:
        kind_V: int64, index into KINDS, judged by the piece alone.
        joins_next_V: bool, True if the next piece continues this word (subword-nmt's ``@@``).
        band_V: int64, index into FREQUENCIES; 0 for tokens that do not occur.
        common_V: int64, place among the ``NUM_COMMON`` most frequent tokens, ``NUM_COMMON`` for all others.
        common_ids: the ids at those places.
    """

    kind_V: Tensor
    joins_next_V: Tensor
    band_V: Tensor
    common_V: Tensor
    common_ids: tuple[int, ...]
    symbols: tuple[str, ...]
    padding: int


def vocabulary(dictionary: Any, count_V: Tensor) -> Vocabulary:
    """Tables for one side. ``count_V``: int64, occurrences of each id in the analysed set."""
    symbols = tuple(dictionary[i] for i in range(len(dictionary)))
    marked = any(symbol.startswith(_START_MARK) for symbol in symbols)
    kinds = [_kind(symbol, marked, i < dictionary.nspecial) for i, symbol in enumerate(symbols)]
    # 1-3 -> 0, 4-15 -> 1, ...: half the number of binary digits
    bands = [min(max((int(count).bit_length() - 1) // 2, 0), len(FREQUENCIES) - 1) for count in count_V.tolist()]
    order = torch.argsort(count_V, descending=True, stable=True)[:NUM_COMMON]
    order = order[count_V[order] > 0]
    common = torch.full_like(count_V, NUM_COMMON)
    common[order] = torch.arange(order.numel(), device=order.device)
    device = count_V.device
    return Vocabulary(
        torch.tensor(kinds, device=device),
        torch.tensor([symbol.endswith(_JOINER) for symbol in symbols], device=device),
        torch.tensor(bands, device=device),
        common,
        tuple(order.tolist()),
        symbols,
        dictionary.pad(),
    )


def _kind(symbol: str, marked: bool, is_special: bool) -> int:
    if is_special:
        return KINDS.index("special")
    core = symbol.removeprefix(_START_MARK).removesuffix(_JOINER)
    if any(character.isdigit() for character in core) and not any(character.isalpha() for character in core):
        return KINDS.index("digits")
    if core and not any(character.isalnum() for character in core):
        return KINDS.index("punctuation")
    return KINDS.index("continuation" if marked and not symbol.startswith(_START_MARK) else "word start")


def groups(ids_BT: Tensor, table: Vocabulary) -> dict[str, Tensor]:
    """Name of a grouping -> int64 (T,): the group of each row, -1 at padding.

    The tenth of a sentence counts the end mark as part of it.
    """
    ids_TB = ids_BT.t()
    real_TB = ids_TB.ne(table.padding)
    kind_TB = table.kind_V[ids_TB]
    joined_TB = torch.zeros_like(real_TB)
    joined_TB[1:] = table.joins_next_V[ids_TB[:-1]]
    starts = joined_TB & (kind_TB == KINDS.index("word start"))
    kind_TB = kind_TB.masked_fill(starts, KINDS.index("continuation"))
    place_TB = real_TB.cumsum(dim=0) - 1
    tenth_TB = place_TB * 10 // real_TB.sum(dim=0).clamp(min=1)
    named = {
        "kind": kind_TB,
        "frequency": table.band_V[ids_TB],
        "position": tenth_TB,
        "token": table.common_V[ids_TB],
    }
    return {name: value.masked_fill(~real_TB, -1).reshape(-1) for name, value in named.items()}


GROUP_NAMES = {"kind": KINDS, "frequency": FREQUENCIES, "position": TENTHS}
