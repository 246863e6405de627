"""Check raw parallel text PREFIX.SRC and PREFIX.TGT before it is used; change nothing.

Each problem names file, line, value, what is allowed and the way out. Held-out text is checked like the rest, and its
pairs that the other text repeats are counted. Memory holds one line of each side and the held-out lines.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.languages import is_blank, look_swapped
from data_prep.textio import language_pair, read_lines
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.files import open_aside

MAX_LISTED = 10
# The first lines of each side tell whether the sides are swapped.
SAMPLE_LINES = 400
# A larger share of repeated pairs in a held-out text is an error, a smaller one a warning.
MAX_OVERLAP = 0.5
# Characters at which str.splitlines, and tools built on it, break a line that is one line to fairseq.
_LINE_BREAKERS = {
    "\x00": "NUL",
    "\x0b": "a vertical tab (U+000B)",
    "\x0c": "a form feed (U+000C)",
    "\r": "a bare carriage return (U+000D)",
    "\x1c": "a file separator (U+001C)",
    "\x1d": "a group separator (U+001D)",
    "\x1e": "a record separator (U+001E)",
    "\x85": "a next-line control (U+0085)",
    "\u2028": "a line separator (U+2028)",
    "\u2029": "a paragraph separator (U+2029)",
}
_BREAKER = re.compile("[" + "".join(_LINE_BREAKERS) + "]")
_BOM = b"\xef\xbb\xbf"


@dataclass
class Report:
    """Lines and problems of one prefix.

    Attributes:
        lines: pairs of lines read; the smaller of the two counts if they differ.
        problems: the first MAX_LISTED of them, in the order of the text.
        total: number of all problems.
    """

    lines: int = 0
    problems: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, problem: str) -> None:
        self.total += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(problem)


def side_path(prefix: str | Path, language: str) -> Path:
    return Path(f"{prefix}.{language}")


def validate(prefix: str | Path, source: str, target: str, *, max_chars: int = 10_000) -> Report:
    """Check one prefix line by line.

    Args:
        prefix: the files are ``prefix.source`` and ``prefix.target``.
        max_chars: longest line allowed, in Unicode characters.
    Returns: a Report; the text is valid if ``report.total == 0``.
    """
    report = Report()
    paths = side_path(prefix, source), side_path(prefix, target)
    for path in paths:
        for problem in file_problems(path, prefix):
            report.add(problem)
    if report.total:
        return report
    mend = shlex.join(
        ["xmoe", "prepare", "clean", "--pair", f"{source}-{target}", "--input", str(prefix), "--out", f"{prefix}.clean"]
    )
    counts = [0, 0]
    crlf_told: set[Path] = set()
    sample: tuple[list[str], list[str]] = ([], [])
    with paths[0].open("rb") as source_file, paths[1].open("rb") as target_file:
        for pair in itertools.zip_longest(read_lines(source_file), read_lines(target_file)):
            for side, (path, raw) in enumerate(zip(paths, pair, strict=True)):
                if raw is None:
                    continue
                counts[side] += 1
                check_line(report, path, counts[side], raw, max_chars, mend, crlf_told)
                if counts[side] <= SAMPLE_LINES:
                    sample[side].append(raw.decode(errors="ignore"))
    report.lines = min(counts)
    if counts[0] != counts[1]:
        shorter = paths[counts[0] > counts[1]].name
        report.add(
            f"{paths[0]} has {counts[0]} lines, {paths[1]} has {counts[1]}: both sides need equal counts, "
            f"line N translating line N; look for a lost or split line, {shorter} being the shorter side, "
            "and export both sides together again"
        )
    if not report.total and look_swapped(sample, (source, target)):
        report.add(
            f"{paths[0]} looks like {target} and {paths[1]} like {source}: the languages are swapped; "
            f"rename the files, or give --pair {target}-{source}"
        )
    return report


@dataclass
class Overlap:
    """Lines of a held-out text, and how many of its pairs and source lines occur in other text."""

    lines: int
    pairs: int
    sources: int


def overlaps(prefixes: Sequence[str], held_out: Sequence[str], source: str, target: str) -> dict[str, Overlap]:
    """How many lines of each held-out text occur in ``prefixes``, without regard to white space at the ends."""
    wanted = {pair for prefix in held_out for pair in _pairs(prefix, source, target)}
    wanted_sources = {pair[0] for pair in wanted}
    found, found_sources = set[tuple[bytes, bytes]](), set[bytes]()
    for prefix in prefixes:
        for pair in _pairs(prefix, source, target):
            if pair[0] in wanted_sources:
                found_sources.add(pair[0])
                if pair in wanted:
                    found.add(pair)
    results = {}
    for prefix in held_out:
        pairs = list(_pairs(prefix, source, target))
        results[prefix] = Overlap(
            len(pairs), sum(pair in found for pair in pairs), sum(pair[0] in found_sources for pair in pairs)
        )
    return results


def _pairs(prefix: str, source: str, target: str) -> Iterator[tuple[bytes, bytes]]:
    with side_path(prefix, source).open("rb") as source_file, side_path(prefix, target).open("rb") as target_file:
        for pair in zip(source_file, target_file, strict=False):
            yield pair[0].strip(), pair[1].strip()


def file_problems(path: Path, prefix: str | Path) -> Iterator[str]:
    """Yield a problem if the file is missing or empty."""
    if not path.is_file():
        pattern = Path(prefix).name + "."
        folder = path.parent
        found = sorted(f.name for f in folder.iterdir() if f.name.startswith(pattern)) if folder.is_dir() else []
        there = ", ".join(found[:8]) or "no file of that prefix"
        way_out = "give the prefix without the language code, or another --pair"
        yield f"{path}: no such file; {folder} has {there}; {way_out}"
    elif path.stat().st_size == 0:
        yield f"{path}: empty file; at least one line is needed; check the step that wrote it"


def check_line(
    report: Report, path: Path, number: int, raw: bytes, max_chars: int, mend: str, crlf_told: set[Path]
) -> None:
    """Add the problems of one line; Windows line ends are reported once a file."""
    where = f"{path}:{number}"
    if number == 1 and raw.startswith(_BOM):
        report.add(f"{where}: begins with a byte order mark (EF BB BF); plain UTF-8 is needed; mended by: {mend}")
        raw = raw[len(_BOM) :]
    if raw.endswith(b"\r"):
        if path not in crlf_told:
            report.add(f"{where}: Windows line ends (CR LF), said once a file; LF alone is needed; mended by: {mend}")
        crlf_told.add(path)
        raw = raw[:-1]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        utf16 = " (the file looks like UTF-16)" if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        report.add(
            f"{where}: byte {error.start} of the line is 0x{raw[error.start]:02X}, not valid UTF-8{utf16}; "
            f"convert with iconv -f OLD_ENCODING -t UTF-8, or drop such lines by: {mend}"
        )
        return
    if is_blank(text):
        what = "no visible character" if text.strip() else "empty line"
        report.add(f"{where}: {what}; every line needs text on both sides; dropped by: {mend}")
    if match := _BREAKER.search(text):
        report.add(
            f"{where}: {_LINE_BREAKERS[match[0]]} at character {match.start() + 1}; a line may hold NUL and "
            "characters that other tools take for its end nowhere; "
            f"{'dropped' if match[0] == chr(0) else 'mended'} by: {mend}"
        )
    if len(text) > max_chars:
        report.add(
            f"{where}: {len(text)} characters, at most {max_chars} are allowed; raise --max-chars, or drop by: {mend}"
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "prepare validate", "Check raw parallel text. Exit: 0 valid, 1 problems found, 2 bad arguments."
    )
    parser.flag("--pair", type=language_pair, required=True)
    parser.add_argument("--max-chars", type=at_least(1), default=10_000, help="longest line (default 10000)")
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="checks PREFIX.SRC and PREFIX.TGT")
    held_out_help = "development and test texts: checked, too, and how much of them the others repeat"
    parser.add_argument("--held-out", nargs="+", default=[], metavar="PREFIX", help=held_out_help)
    parser.add_argument("--json", metavar="FILE", help="write how much the held-out texts overlap with the others")
    args = parser.parse_args(argv)
    if not args.prefixes + args.held_out:
        parser.error("give at least one PREFIX")
    return args


@reports_errors("validate")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    source, target = args.pair
    valid = True
    for prefix in [*args.prefixes, *args.held_out]:
        report = validate(prefix, source, target, max_chars=args.max_chars)
        if not report.total:
            print(f"{prefix}.{{{source},{target}}}: {report.lines} valid pairs of lines")
            continue
        valid = False
        for problem in report.problems:
            print(f"validate: error: {problem}", file=sys.stderr)
        if report.total > MAX_LISTED:
            print(
                f"validate: error: {prefix}: {report.total - MAX_LISTED} more problems not listed",
                file=sys.stderr,
            )
    if valid and args.held_out:
        valid = _tell_overlaps(args)
    return 0 if valid else 1


def _tell_overlaps(args: argparse.Namespace) -> bool:
    """Print and write the overlaps. Returns: True if none is above MAX_OVERLAP."""
    found = overlaps(args.prefixes, args.held_out, *args.pair)
    if args.json:
        content = {"held_out": [{"text": prefix, **asdict(overlap)} for prefix, overlap in found.items()]}
        with open_aside([Path(args.json)]) as (file,):
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    few = True
    for prefix, overlap in found.items():
        if not overlap.sources:
            continue
        is_little = overlap.pairs <= MAX_OVERLAP * overlap.lines
        few = few and is_little
        print(
            f"validate: {'warning' if is_little else 'error'}: {overlap.pairs} of {overlap.lines} pairs of {prefix} "
            f"are in the training text ({overlap.sources} by their source): scores on them say little; take them out "
            f"of it with xmoe prepare clean --exclude {prefix}",
            file=sys.stderr,
        )
    return few


if __name__ == "__main__":
    sys.exit(main())
