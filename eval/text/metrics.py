"""sacreBLEU's metrics with this project's settings, which stand only here.

BLEU and chrF2++ are the paper's: ``nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`` and
``nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no`` (XMoE, arXiv:2403.18926, section 4).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric

METRICS = ("bleu", "chrf++", "chrf", "ter")

# sacreBLEU picks BLEU's tokenizer by two-letter codes; other names of the same languages lead to them.
_TWO_LETTER = {"zho": "zh", "cmn": "zh", "chi": "zh", "jpn": "ja", "kor": "ko"}
_UNSPACED = ("zh", "ja")


def normalise_language(code: str) -> str:
    """``zh_CN``, ``zho_Hans`` and ``zh`` all give ``zh``.

    Raises: ValueError if ``code`` does not start with two or three letters.
    """
    match = re.fullmatch(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]+)*", code)
    if match is None:
        raise ValueError(f"target language {code!r}: expected a code such as en, zh or zho_Hans")
    base = match.group(1).lower()
    return _TWO_LETTER.get(base, base)


def build_metrics(names: Sequence[str], target_language: str, references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """sacreBLEU metric objects with cached references.

    BLEU takes sacreBLEU's tokenizer of the language (zh, ja-mecab, ko-mecab, 13a for all others). TER splits
    Chinese and Japanese into characters, since it counts words.

    Args:
        names: out of `METRICS`.
        target_language: language code of hypotheses and references.
        references: one list of segments per reference file, all of the same length.
    Raises: ValueError for an unknown metric or language, or a tokenizer whose packages are not installed.
    """
    language = normalise_language(target_language)
    refs = [list(reference) for reference in references]
    unspaced = language in _UNSPACED

    def build(name: str) -> Metric:
        if name == "bleu":
            return BLEU(trg_lang=language, references=refs)
        if name == "chrf++":
            return CHRF(word_order=2, references=refs)
        if name == "chrf":
            return CHRF(references=refs)
        if name == "ter":
            return TER(normalized=unspaced, asian_support=unspaced, references=refs)
        raise ValueError(f"metric {name!r}: choose from {', '.join(METRICS)}")

    try:
        return {name: build(name) for name in names}
    except RuntimeError as error:  # a tokenizer's packages are missing
        raise ValueError(f"target language {language}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def sacrebleu_seed(seed: int | None) -> Iterator[None]:
    """Set ``SACREBLEU_SEED``, which seeds sacreBLEU's resampling, while the block runs.

    ``None`` leaves the environment as it is (sacreBLEU's default is 12345; ``none`` there means random).
    """
    before = os.environ.get("SACREBLEU_SEED")
    if seed is not None:
        os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if seed is not None:
            if before is None:
                del os.environ["SACREBLEU_SEED"]
            else:
                os.environ["SACREBLEU_SEED"] = before


def check_parallel(named: dict[str, list[str]]) -> None:
    """Raise ValueError unless all named files have the same number of lines."""
    if len({len(lines) for lines in named.values()}) > 1:
        counts = ", ".join(f"{name} has {len(lines)}" for name, lines in named.items())
        raise ValueError(f"line counts differ: {counts}; line n of each file must be the same sentence")


def check_not_empty(name: str, hypotheses: Sequence[str]) -> int:
    """The number of empty hypotheses. Raises: ValueError if all are empty."""
    empty = sum(not line.strip() for line in hypotheses)
    if empty == len(hypotheses):
        raise ValueError(f"{name}: all {empty} hypotheses are empty; the translation step went wrong")
    return empty
