"""Tell languages apart by script and by language identification; find lines without a visible character."""

import functools
from collections.abc import Callable, Sequence

import regex

from data_prep.textio import DataError

SCRIPTS = {
    **dict.fromkeys(["be", "bg", "kk", "mk", "ru", "sr", "uk"], "Cyrillic"),
    **dict.fromkeys(["cs", "da", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "is", "it"], "Latin"),
    **dict.fromkeys(["lt", "lv", "nl", "no", "pl", "pt", "ro", "sk", "sl", "sv", "tr", "vi"], "Latin"),
    "ar": "Arabic", "el": "Greek", "fa": "Arabic", "he": "Hebrew", "hi": "Devanagari", "hy": "Armenian",
    "ja": "Han Hiragana Katakana", "ka": "Georgian", "ko": "Hangul", "th": "Thai", "zh": "Han",
}  # fmt: skip
_LETTER = regex.compile(r"\p{L}+")
# Not visible are white space, format characters (U+200E), controls, marks without a base, and letters that are empty
# by design (Hangul fillers, Braille pattern blank).
_VISIBLE = regex.compile(r"[^\p{C}\p{Z}\p{M}\u115f\u1160\u2800\u3164\uffa0]")
_LINES_A_BLOCK = 20


def is_blank(text: str) -> bool:
    """True if ``text`` has no visible character."""
    return _VISIBLE.search(text) is None


@functools.cache
def script_letters(script: str) -> "regex.Pattern[str]":
    """Runs of letters of the named Unicode scripts. Raises: regex.error for an unknown script."""
    return regex.compile("[" + "".join(rf"\p{{Script={name}}}" for name in script.split()) + "]+")


def script_share(text: str, script: str) -> float:
    """Share of the letters that are in one of the named Unicode scripts; 1 for a text without letters."""
    letters = sum(map(len, _LETTER.findall(text)))
    return sum(map(len, script_letters(script).findall("".join(_LETTER.findall(text))))) / letters if letters else 1.0


@functools.cache
def language_identifier() -> Callable[[str], tuple[str, float]]:
    """Load py3langid, once for each process; it gives probabilities over all its languages."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(f"--language-id py3langid: {error}; install it by: pip install py3langid==0.4.0") from None
    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True
    ).classify
    return classify


def look_swapped(sides: Sequence[Sequence[str]], languages: Sequence[str]) -> bool:
    """True if each side of a sample of text is in the language of the other.

    This compares scripts where those of the two languages differ, and otherwise identifies the language of blocks of
    lines, because single lines are too short. False where the languages are unknown or there are no letters.
    """
    scripts = [SCRIPTS.get(language, "") for language in languages]
    texts = [" ".join(lines) for lines in sides]
    if "" in scripts or not all(_LETTER.search(text) for text in texts):
        return False
    if scripts[0] != scripts[1]:
        return all(
            script_share(text, scripts[1 - side]) > 0.5 > script_share(text, scripts[side])
            for side, text in enumerate(texts)
        )
    return all(_mostly(lines, languages[1 - side]) for side, lines in enumerate(sides))


def _mostly(lines: Sequence[str], language: str) -> bool:
    blocks = [" ".join(lines[start : start + _LINES_A_BLOCK]) for start in range(0, len(lines), _LINES_A_BLOCK)]
    found = [language_identifier()(block)[0] for block in blocks]
    return found.count(language) > len(found) / 2
