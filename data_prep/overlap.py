"""Count how much of held-out texts occurs in other text, such as a test set's lines in the training text."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from data_prep.textio import side_path


@dataclass
class Overlap:
    """Lines of a held-out text, and how many of its pairs and source lines occur in other text."""

    lines: int
    pairs: int
    sources: int


def overlaps(prefixes: Sequence[str], held_out: Sequence[str], *languages: str) -> dict[str, Overlap]:
    """How many lines of each held-out text occur in ``prefixes``, without regard to white space at the ends."""
    wanted = {pair for prefix in held_out for pair in _pairs(prefix, languages)}
    wanted_sources = {pair[0] for pair in wanted}
    found, found_sources = set[tuple[bytes, ...]](), set[bytes]()
    for prefix in prefixes:
        for pair in _pairs(prefix, languages):
            if pair[0] in wanted_sources:
                found_sources.add(pair[0])
                if pair in wanted:
                    found.add(pair)
    results = {}
    for prefix in held_out:
        pairs = list(_pairs(prefix, languages))
        results[prefix] = Overlap(
            len(pairs), sum(pair in found for pair in pairs), sum(pair[0] in found_sources for pair in pairs)
        )
    return results


def _pairs(prefix: str, languages: Sequence[str]) -> Iterator[tuple[bytes, ...]]:
    with ExitStack() as stack:
        sides = [stack.enter_context(side_path(prefix, language).open("rb")) for language in languages]
        for lines in zip(*sides, strict=False):
            yield tuple(line.strip() for line in lines)
