"""Losses of language models in units of text, words and bytes, which do not depend on the subwords."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from eval.text import files

SPLITS = ("train", "valid", "test")  # the order of the texts in text.json


def text_sizes(data: str | Path) -> dict[str, dict[str, int]]:
    """Split -> ``lines``, ``words`` and ``bytes`` of its text, line ends included; empty where the data hold none."""
    path = Path(data) / "text.json"
    return dict(zip(SPLITS, files.read_json(path)["texts"], strict=True)) if path.is_file() else {}


def in_units_of_text(loss_bits: float, tokens: int, size: Mapping[str, int] | None) -> dict[str, float | None]:
    """``word_perplexity`` and ``bits_per_byte`` of a loss in bits a token; None where the text's size is not known."""
    if size is None:
        return {"word_perplexity": None, "bits_per_byte": None}
    bits = loss_bits * tokens
    bits_per_word = bits / (size["words"] + size["lines"])
    perplexity = 2**bits_per_word if bits_per_word < 1000 else math.inf
    return {"word_perplexity": perplexity, "bits_per_byte": bits / size["bytes"]}
