"""Render measures, rates, amounts, percentages and numbers in one language, by CLDR and num2words."""

import re
import unicodedata
from typing import Any, cast

from babel import Locale, numbers, units
from num2words import num2words

UNITS = (
    "area-hectare", "area-square-kilometer", "area-square-meter", "digital-byte", "digital-gigabyte",
    "digital-megabyte", "duration-century", "duration-day", "duration-decade", "duration-hour",
    "duration-minute", "duration-month", "duration-second", "duration-week", "duration-year",
    "energy-joule", "energy-kilocalorie", "energy-kilowatt-hour", "frequency-megahertz",
    "length-centimeter", "length-foot", "length-inch", "length-kilometer", "length-light-year",
    "length-meter", "length-mile", "length-millimeter", "mass-gram", "mass-kilogram", "mass-milligram",
    "mass-ounce", "mass-pound", "mass-tonne", "power-horsepower", "power-kilowatt", "power-watt",
    "pressure-hectopascal", "speed-kilometer-per-hour", "speed-knot", "speed-meter-per-second",
    "speed-mile-per-hour", "temperature-celsius", "temperature-fahrenheit", "volume-barrel",
    "volume-cubic-meter", "volume-gallon", "volume-liter", "volume-milliliter", "volume-tablespoon",
)  # fmt: skip
RATE_UNITS = (
    "length-kilometer", "length-meter", "length-mile", "mass-kilogram", "mass-gram", "volume-liter",
    "volume-gallon", "energy-kilowatt-hour", "digital-megabyte", "volume-barrel",
)  # fmt: skip
PER_UNITS = (
    "duration-second", "duration-minute", "duration-hour", "duration-day", "duration-week", "duration-year",
)  # fmt: skip
CURRENCIES = (
    "USD", "EUR", "UAH", "GBP", "JPY", "CNY", "CHF", "CAD", "AUD", "INR", "BRL", "MXN", "PLN", "CZK",
    "HUF", "SEK", "NOK", "DKK", "ILS", "TRY", "EGP", "ZAR", "KRW", "THB", "VND", "IDR", "KZT", "GEL",
    "RON", "BGN", "ARS", "CLP", "NZD", "SGD", "MAD",
)  # fmt: skip
_SPACES = re.compile(r"[\s\u00a0\u2000-\u200a\u202f\u205f\u3000]+")
_BIDI_MARKS = re.compile(r"[\u200e\u200f\u061c]")


def plain(text: str) -> str:
    """``text`` in NFC, with single plain spaces and without bidirectional marks."""
    return _SPACES.sub(" ", _BIDI_MARKS.sub("", unicodedata.normalize("NFC", text))).strip()


def format_measure(number: float, style: str, locale: Locale) -> str:
    """``style`` is UNIT/LENGTH, for instance ``length-meter/long``."""
    unit, length = cast(tuple[str, Any], style.split("/"))
    text = units.format_unit(number, unit, length=length, locale=locale)
    if unit in text:  # Babel returned the identifier: this locale (Chinese) has one length only, called short
        text = units.format_unit(number, unit, length="short", locale=locale)
    return str(text)


def format_rate(number: float, rate: str, locale: Locale) -> str:
    """``rate`` is UNIT/UNIT, for instance ``length-meter/duration-second``."""
    unit, per = rate.split("/")
    lengths: tuple[Any, ...] = ("long", "short")
    shown = [
        units.format_compound_unit(number, unit, denominator_unit=per, length=length, locale=locale) or rate
        for length in lengths
    ]
    return next((text for text in shown if unit not in text and per not in text), rate)


def format_amount(number: float, code: str, locale: Locale) -> str:
    """An amount with the currency's name; ".00" is left out because Babel would take the whole number's plural form."""
    return numbers.format_currency(
        number, code, format="#,##0.##", format_type="name", currency_digits=False, locale=locale
    )


def percent_pattern(locale: Locale) -> str:
    """The locale's percent pattern with one decimal place where there is one."""
    return str(locale.percent_formats[None].pattern).replace("#,##0", "#,##0.#")


def spell(number: int, style: str, locale: Locale) -> str:
    return str(num2words(number, to=style, lang=locale.language))


def can_spell(language: str) -> bool:
    try:
        num2words(21, lang=language)
    except NotImplementedError:
        return False
    return True
