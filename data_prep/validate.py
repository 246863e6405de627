"""Check raw parallel text PREFIX.SRC and PREFIX.TGT before anything is built on it; changes nothing.

Each problem names file, line, value, what is allowed and the way out. Memory: one line of each side.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.textio import language_pair, read_lines
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors

MAX_LISTED = 10
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
    """What one prefix holds.

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
    mend = f"python -m data_prep.clean --pair {source}-{target} --input {prefix} --output {prefix}.clean"
    counts = [0, 0]
    crlf_told: set[Path] = set()
    with paths[0].open("rb") as source_file, paths[1].open("rb") as target_file:
        for pair in itertools.zip_longest(read_lines(source_file), read_lines(target_file)):
            for side, (path, raw) in enumerate(zip(paths, pair, strict=True)):
                if raw is None:
                    continue
                counts[side] += 1
                check_line(report, path, counts[side], raw, max_chars, mend, crlf_told)
    report.lines = min(counts)
    if counts[0] != counts[1]:
        shorter = paths[counts[0] > counts[1]].name
        report.add(
            f"{paths[0]} has {counts[0]} lines, {paths[1]} has {counts[1]}: both sides need equal counts, "
            f"line N translating line N; look for a lost or split line, {shorter} being the shorter side, "
            "and export both sides together again"
        )
    return report


def file_problems(path: Path, prefix: str | Path) -> Iterator[str]:
    """A missing or empty file."""
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
    """Add the problems of one line; Windows line ends are told once a file."""
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
    if not text.strip():
        report.add(f"{where}: empty line; every line needs text on both sides; dropped by: {mend}")
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
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="checks PREFIX.SRC and PREFIX.TGT")
    return parser.parse_args(argv)


@reports_errors("validate")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    source, target = args.pair
    valid = True
    for prefix in args.prefixes:
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
    return 0 if valid else 1


if __name__ == "__main__":
    sys.exit(main())
