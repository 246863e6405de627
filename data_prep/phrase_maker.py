"""Make phrases in two languages from CLDR and num2words: dates, times, measures, amounts, names and numbers."""

import datetime as dt
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from babel import Locale, dates, lists, numbers
from babel.localedata import locale_identifiers

from data_prep.phrase_formats import (
    CURRENCIES,
    PER_UNITS,
    RATE_UNITS,
    UNITS,
    can_spell,
    format_amount,
    format_measure,
    format_rate,
    percent_pattern,
    plain,
    spell,
)

SOURCES = ("uk", "de", "ru", "he", "zh")

Phrase = tuple[str, str]
Render = Callable[[Locale, Any], str]


@dataclass(frozen=True)
class PhraseMaker:
    """Makes phrases of one language pair. Its lists hold only what both languages have."""

    source: Locale
    target: Locale
    names: tuple[Phrase, ...]
    locale_names: tuple[str, ...]
    unit_styles: tuple[str, ...]
    rates: tuple[str, ...]
    currency_codes: tuple[str, ...]
    spells_numbers: bool
    has_or_lists: bool

    def same_in_both(self, rng: random.Random, styles: Sequence[str], render: Render) -> Phrase:
        """Render one random style in both languages; look-alikes in the source share the first target."""
        shown = render(self.source, rng.choice(styles))
        style = next(style for style in styles if render(self.source, style) == shown)
        return shown, render(self.target, style)

    def date(self, rng: random.Random) -> Phrase:
        day = random_day(rng)

        def render(locale: Locale, style: Any) -> str:
            if style in ("full", "long", "medium", "short"):
                return dates.format_date(day, style, locale=locale)
            return dates.format_skeleton(style, day, locale=locale)

        # MMMEd and the like carry no year, so their source never equals that of a longer style
        return self.same_in_both(rng, ("full", "long", "medium", "short", "yMMMEd", "MMMMd", "MMMEd", "yMMMM"), render)

    def time(self, rng: random.Random) -> Phrase:
        time = dt.time(rng.randrange(24), rng.choice((0, 5, 10, 15, 20, 30, 45, rng.randrange(60))))
        return self.same_in_both(rng, ("short",), lambda locale, style: dates.format_time(time, style, locale=locale))

    def date_and_time(self, rng: random.Random) -> Phrase:
        moment = dt.datetime.combine(random_day(rng), dt.time(rng.randrange(24), rng.randrange(0, 60, 5)))

        def render(locale: Locale, style: Any) -> str:
            pattern = str(dates.get_datetime_format(style, locale))
            clock = dates.format_time(moment.time(), "short", locale=locale)
            day = dates.format_date(moment.date(), style, locale=locale)
            return pattern.replace("'", "").replace("{0}", clock).replace("{1}", day)

        return self.same_in_both(rng, ("full", "long", "medium"), render)

    def date_span(self, rng: random.Random) -> Phrase:
        first = random_day(rng)
        last = first + dt.timedelta(days=rng.choice((rng.randrange(1, 20), rng.randrange(30, 300))))

        def render(locale: Locale, style: Any) -> str:
            return dates.format_interval(first, last, style, locale=locale)

        return self.same_in_both(rng, ("yMMMd", "yMMMEd", "MMMd", "yMMMM"), render)

    def time_span(self, rng: random.Random) -> Phrase:
        first, last = sorted(rng.sample(range(0, 24 * 60, 15), 2))
        times = [dt.time(*divmod(minute, 60)) for minute in (first, last)]

        def render(locale: Locale, style: Any) -> str:
            return dates.format_interval(times[0], times[1], style, locale=locale)

        return self.same_in_both(rng, ("Hm",), render)

    def relative_time(self, rng: random.Random) -> Phrase:
        days = rng.choice((1 / 24, 1 / 24 / 60, 1, 7, 365))
        delta = rng.choice((-1, 1)) * rng.randrange(1, 30) * dt.timedelta(days=days)
        return self.same_in_both(
            rng, ("long",), lambda locale, _: dates.format_timedelta(delta, add_direction=True, locale=locale)
        )

    def measure(self, rng: random.Random) -> Phrase:
        number, style = random_number(rng), rng.choice(self.unit_styles)
        return self.same_in_both(rng, (style,), lambda locale, style: format_measure(number, style, locale))

    def rate(self, rng: random.Random) -> Phrase:
        number, rate = random_number(rng), rng.choice(self.rates)
        return self.same_in_both(rng, ("long",), lambda locale, _: format_rate(number, rate, locale))

    def amount(self, rng: random.Random) -> Phrase:
        number, code = (
            rng.choice((random_number(rng), rng.randrange(1, 90) * 100)),
            rng.choice(self.currency_codes),
        )
        return self.same_in_both(rng, ("name",), lambda locale, _: format_amount(number, code, locale))

    def compact_number(self, rng: random.Random) -> Phrase:
        number = rng.randrange(11, 100) * 10 ** rng.randrange(3, 10)  # two digits, so that no language has to round

        def render(locale: Locale, style: Any) -> str:
            style = style if style in locale.compact_decimal_formats else "short"  # Chinese has one style only
            return numbers.format_compact_decimal(number, format_type=style, locale=locale, fraction_digits=1)

        return self.same_in_both(rng, ("long",), render)

    def percent(self, rng: random.Random) -> Phrase:
        share = rng.randrange(1, 1000) / 1000
        return self.same_in_both(
            rng,
            ("percent",),
            lambda locale, _: numbers.format_percent(share, percent_pattern(locale), locale=locale),
        )

    def name(self, rng: random.Random) -> Phrase:
        return rng.choice(self.names)

    def locale_name(self, rng: random.Random) -> Phrase:
        code = Locale.parse(rng.choice(self.locale_names))
        return code.get_display_name(self.source) or "", code.get_display_name(self.target) or ""

    def spelled_number(self, rng: random.Random) -> Phrase:
        number = rng.choice((rng.randrange(1, 100), rng.randrange(100, 1000), rng.randrange(1000, 10_000)))
        return self.same_in_both(rng, ("cardinal", "ordinal"), lambda locale, style: spell(number, style, locale))

    def spelled_year(self, rng: random.Random) -> Phrase:
        # where a year reads like a number (Ukrainian), the first style, cardinal, gives the target
        year = rng.randrange(1100, 2100)
        return self.same_in_both(rng, ("cardinal", "year"), lambda locale, style: spell(year, style, locale))

    def item(self, rng: random.Random) -> Phrase:
        """One random phrase, both sides as of `plain`."""
        kinds = [kind for kind, _ in _WEIGHTS if self.spells_numbers or not kind.startswith("spelled")]
        weights = [weight for kind, weight in _WEIGHTS if kind in kinds]
        source, target = getattr(self, rng.choices(kinds, weights)[0])(rng)
        return plain(source), plain(target)

    def listing(self, rng: random.Random, num_items: int) -> Phrase:
        """``num_items`` phrases, joined by the "and" or "or" list pattern of each language."""
        items = [self.item(rng) for _ in range(num_items)]
        style: Any = "or" if self.has_or_lists and rng.random() < 0.25 else "standard"
        source, target = zip(*items, strict=True)
        return (
            lists.format_list(source, style=style, locale=self.source),
            lists.format_list(target, style=style, locale=self.target),
        )

    def line(self, rng: random.Random) -> Phrase:
        """One line of the corpus: an item, a list, or "label: item or list"."""
        source, target = self.listing(rng, rng.choices((1, 2, 3, 4), (3, 5, 3, 1))[0])
        if rng.random() < 0.3:
            label = self.item(rng)
            colon = "：" if self.source.language == "zh" else ": "
            source, target = label[0] + colon + source, f"{label[1]}: {target}"
        return plain(source), plain(target)


_WEIGHTS = (
    ("date", 3), ("time", 1), ("date_and_time", 2), ("date_span", 2), ("time_span", 1), ("relative_time", 2),
    ("measure", 3), ("rate", 1), ("amount", 3), ("compact_number", 1), ("percent", 1), ("name", 5),
    ("locale_name", 2), ("spelled_number", 3), ("spelled_year", 1),
)  # fmt: skip


def random_day(rng: random.Random) -> dt.date:
    return dt.date(1950, 1, 1) + dt.timedelta(days=rng.randrange(36_500))


def random_number(rng: random.Random) -> float:
    """A random number, mostly small and whole, so that every plural form of every unit occurs."""
    return rng.choice((rng.randrange(1, 10), rng.randrange(1, 100), rng.randrange(1, 1000), rng.randrange(1, 99) / 10))


def unambiguous(keys: Sequence[str], show: Callable[[str], tuple[str, ...]]) -> tuple[str, ...]:
    """The keys whose source forms no earlier key has, so that the source determines the target."""
    seen: set[str] = set()
    kept = []
    for key in keys:
        forms = show(key)
        if seen.isdisjoint(forms):
            kept.append(key)
            seen.update(forms)
    return tuple(kept)


def shared_names(source: Locale, target: Locale) -> tuple[Phrase, ...]:
    """Countries, regions, languages, currencies and time zones by name, one target for each source."""
    names: dict[str, str] = {}
    kinds = [
        (source.territories, target.territories, lambda code: code not in ("ZZ", "XA", "XB", "QO")),
        (source.languages, target.languages, lambda code: len(code) == 2),
        (source.currencies, target.currencies, lambda code: code in CURRENCIES),
    ]
    for ours, theirs, wanted in kinds:
        for code in sorted(set(ours) & set(theirs)):
            if wanted(code):
                names.setdefault(plain(ours[code]), plain(theirs[code]))
    for zone in sorted(set(source.meta_zones) & set(target.meta_zones)):
        ours, theirs = (locale.meta_zones[zone].get("long", {}).get("generic") for locale in (source, target))
        if ours and theirs:
            names.setdefault(plain(ours), plain(theirs))
    return tuple(names.items())


def phrase_maker(source_code: str) -> PhraseMaker:
    """A PhraseMaker for ``source_code`` and English, with what the two languages share."""
    source, target = Locale.parse(source_code), Locale.parse("en")

    def show_measure(style: str) -> tuple[str, ...]:
        return tuple(plain(format_measure(number, style, source)) for number in (1, 2, 5, 21, 1.5))

    def show_amount(code: str) -> tuple[str, ...]:
        return tuple(plain(format_amount(number, code, source)) for number in (1, 2, 5, 1.5))

    def is_known(style: str) -> bool:  # Babel returns the identifier of a unit for which it has no pattern
        return not any(style.split("/")[0] in format_measure(1, style, locale) for locale in (source, target))

    rates = [f"{unit}/{per}" for unit in RATE_UNITS for per in PER_UNITS]
    styles = [f"{unit}/{length}" for length in ("long", "short") for unit in UNITS]
    two_letters = [code for code in sorted(source.languages) if len(code) == 2 and code in target.languages]
    spoken = [f"{language}_{country}" for language, country in _spoken_in(two_letters)]
    return PhraseMaker(
        source=source,
        target=target,
        names=shared_names(source, target),
        locale_names=tuple(spoken),
        rates=tuple(rate for rate in rates if all(format_rate(1, rate, locale) != rate for locale in (source, target))),
        unit_styles=unambiguous([style for style in styles if is_known(style)], show_measure),
        currency_codes=unambiguous(CURRENCIES, show_amount),
        spells_numbers=can_spell(source_code),
        has_or_lists="start" in source.list_patterns.get("or", {}),
    )


def _spoken_in(languages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Language and country of the locales for which CLDR has data, so that the combinations exist."""
    for identifier in sorted(locale_identifiers()):
        language, _, country = identifier.partition("_")
        if language in languages and re.fullmatch("[A-Z]{2}", country):
            yield language, country
