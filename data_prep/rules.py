"""The mends and the rules of `xmoe prepare clean`: what is changed in a pair of lines, and what drops it."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import regex

from data_prep.languages import is_blank, language_identifier, script_share

RULES = {
    "encoding": "a side is not valid UTF-8",
    "empty": "a side is empty, or nothing of it can be seen",
    "control": "a side holds a control, private-use, surrogate or unassigned character, or U+FFFD",
    "length": "a side is shorter or longer than allowed, in words or characters",
    "ratio": "one side is too long for the other",
    "identical": "both sides are equal, letter case aside",
    "script": "too few letters of a side are in the script of its language",
    "language": "language identification is sure that a side is in another language",
    "held_out": "a side occurs in a text given by --exclude",
    "duplicate": "the pair (or, by --duplicates, a side) occurred before",
}
ALWAYS = ("encoding", "empty")  # later steps cannot work without these two
MENDS = ("entities", "nfc", "invisible", "white_space")
NO_SPACES = ("ja", "th", "zh")  # languages whose words cannot be counted without a segmenter
# Characters for one English character, measured on FLORES-200 dev; 1 for other languages.
CHARS_PER_ENGLISH = {"zh": 0.34, "ja": 0.42, "ko": 0.5, "he": 0.8, "ar": 0.87}

_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]+")
_BAD = regex.compile(r"[\p{Cc}\p{Co}\p{Cs}\p{Cn}\ufffd]")


@dataclass(frozen=True)
class Settings:
    """Everything that decides whether a pair is kept; the report repeats it."""

    source: str
    target: str
    source_script: str
    target_script: str
    skip: tuple[str, ...] = ()
    min_words: int = 1
    max_words: int = 200
    max_chars: int = 1000
    max_ratio: float = 3.0
    min_script: float = 0.5
    language_id: str = "none"
    min_confidence: float = 0.8
    duplicates: str = "pair"


def mend(text: str, counts: Counter[str]) -> str:
    """Undo HTML entities, compose (NFC), drop invisible characters and make white space single spaces.

    ``counts`` gains one for each of MENDS that changed the line.
    """
    if "&" in text and (decoded := html.unescape(text)) != text:
        counts["entities"] += 1
        text = decoded
    if not unicodedata.is_normalized("NFC", text):
        counts["nfc"] += 1
        text = unicodedata.normalize("NFC", text)
    if _INVISIBLE.search(text):
        counts["invisible"] += 1
        text = _INVISIBLE.sub("", text)
    if (spaced := " ".join(text.split())) != text:
        counts["white_space"] += 1
    return spaced


def length_ratio(source: str, target: str, source_language: str, target_language: str) -> float:
    """How many times longer one side is than the other makes expect, at least 1.

    Lengths are characters divided by CHARS_PER_ENGLISH, plus 10 on each side so that short lines pass.
    """
    ours = len(source) / CHARS_PER_ENGLISH.get(source_language, 1.0) + 10
    theirs = len(target) / CHARS_PER_ENGLISH.get(target_language, 1.0) + 10
    return max(ours / theirs, theirs / ours)


def failed_rule(source: str, target: str, settings: Settings) -> str | None:
    """The first rule that a mended pair fails, of the rules that look at this pair alone."""
    sides = (
        (source, settings.source, settings.source_script),
        (target, settings.target, settings.target_script),
    )
    if is_blank(source) or is_blank(target):
        return "empty"
    tests: dict[str, Callable[[], bool]] = {
        "control": lambda: any(_BAD.search(text) for text, _, _ in sides),
        "length": lambda: any(_wrong_length(text, language, settings) for text, language, _ in sides),
        "ratio": lambda: length_ratio(source, target, settings.source, settings.target) > settings.max_ratio,
        "identical": lambda: source.casefold() == target.casefold(),
        "script": lambda: any(script_share(text, script) < settings.min_script for text, _, script in sides),
        "language": lambda: (
            settings.language_id != "none"
            and any(_other_language(text, language, settings.min_confidence) for text, language, _ in sides)
        ),
    }
    return next((rule for rule, fails in tests.items() if rule not in settings.skip and fails()), None)


def _wrong_length(text: str, language: str, settings: Settings) -> bool:
    if len(text) > settings.max_chars:
        return True
    return language not in NO_SPACES and not settings.min_words <= text.count(" ") + 1 <= settings.max_words


def _other_language(text: str, language: str, min_confidence: float) -> bool:
    found, confidence = language_identifier()(text)
    return found != language and confidence >= min_confidence
