"""Cut a text that is too long for a model into chunks that fit, at sentence ends, commas or spaces."""

from __future__ import annotations

import re
from collections.abc import Callable

# Places to cut, the best first; a cut is after the matched characters. Marks of Chinese and Japanese need no space
# behind them.
_BOUNDARIES = (
    re.compile(r"(?<=[.!?…؟]\s)|(?<=[.!?…؟][\"'»”’)\]]\s)|(?<=[。！？])"),  # sentences
    re.compile(r"(?<=[,;:،؛]\s)|(?<=[，；：、])"),  # clauses
    re.compile(r"(?<=\s)"),  # words
)


def split_text(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Chunks of ``text``, in order, none empty, each with at most ``limit`` tokens.

    As many whole sentences as fit go into one chunk; a sentence that is too long by itself is cut after
    commas and the like, then between words, at last inside a word.

    Args:
        text: one line.
        limit: largest number of tokens in a chunk, at least 1.
        count: number of tokens of a text; need not be additive.
    Raises: ValueError if a single character needs more tokens than ``limit``.
    """
    return _split(text.strip(), limit, count, level=0)


def _split(text: str, limit: int, count: Callable[[str], int], level: int) -> list[str]:
    if not text or count(text) <= limit:
        return [text] if text else []
    if level == len(_BOUNDARIES):
        return _halve(text, limit, count)
    units = [unit for unit in _BOUNDARIES[level].split(text) if unit]
    chunks = _pack(units, limit, count)
    return [piece for chunk in chunks for piece in _split(chunk.strip(), limit, count, level + 1)]


def _pack(units: list[str], limit: int, count: Callable[[str], int]) -> list[str]:
    chunks, size = [""], 0
    for unit in units:
        tokens = count(unit.strip())
        if chunks[-1] and size + tokens > limit:
            chunks.append("")
            size = 0
        chunks[-1] += unit
        size += tokens
    return chunks


def _halve(word: str, limit: int, count: Callable[[str], int]) -> list[str]:
    if count(word) <= limit:
        return [word]
    if len(word) == 1:
        raise ValueError(f"{word!r} alone needs {count(word)} tokens, the limit is {limit}; raise --max-length")
    middle = len(word) // 2
    return _halve(word[:middle], limit, count) + _halve(word[middle:], limit, count)
