"""Check raw text PREFIX.SRC and PREFIX.TGT, or PREFIX.LANGUAGE, before it is used; change nothing.

Each problem names file, line, value, what is allowed and the way out. Held-out text is checked like the rest, and its
pairs (or lines) that the other text repeats are counted. Memory holds one line of each side and the held-out lines.
"""

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.languages import is_blank, look_swapped
from data_prep.overlap import Overlap, overlaps
from data_prep.textio import language_code, language_pair, read_lines, side_path
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
        words: number of runs without white space, over all languages.
        num_bytes: bytes of all languages in UTF-8, line ends included.
        problems: the first MAX_LISTED of them, in the order of the text.
        total: number of all problems.
    """

    lines: int = 0
    words: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, problem: str) -> None:
        self.total += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(problem)


def validate(prefix: str | Path, *languages: str, max_chars: int = 10_000) -> Report:
    """Check one prefix line by line.

    Args:
        languages: the files are ``prefix.language``: two for parallel text, one for a language model's.
        max_chars: longest line allowed, in Unicode characters.
    Returns: a Report; the text is valid if ``report.total == 0``.
    """
    report = Report()
    paths = [side_path(prefix, language) for language in languages]
    for path in paths:
        for problem in file_problems(path, prefix):
            report.add(problem)
    if report.total:
        return report
    mend = _mend(prefix, languages)
    counts = [0] * len(paths)
    crlf_told: set[Path] = set()
    sample: list[list[str]] = [[] for _ in paths]
    with ExitStack() as stack:
        sides = [read_lines(stack.enter_context(path.open("rb"))) for path in paths]
        for group in itertools.zip_longest(*sides):
            for side, (path, raw) in enumerate(zip(paths, group, strict=True)):
                if raw is None:
                    continue
                counts[side] += 1
                report.words += len(raw.split())
                report.num_bytes += len(raw) + 1
                check_line(report, path, counts[side], raw, max_chars, mend, crlf_told)
                if counts[side] <= SAMPLE_LINES:
                    sample[side].append(raw.decode(errors="ignore"))
    report.lines = min(counts)
    if len(paths) == 2:
        _compare_sides(report, paths, languages, counts, sample)
    return report


def _mend(prefix: str | Path, languages: Sequence[str]) -> str:
    """The command that mends most problems."""
    if len(languages) == 1:
        return "an editor, sed or iconv"
    pair, out = "-".join(languages), f"{prefix}.clean"
    return shlex.join(["xmoe", "prepare", "clean", "--pair", pair, "--input", str(prefix), "--out", out])


def _compare_sides(
    report: Report, paths: Sequence[Path], languages: Sequence[str], counts: Sequence[int], sample: Sequence[list[str]]
) -> None:
    """Add unequal counts and swapped languages."""
    source, target = languages
    if counts[0] != counts[1]:
        shorter = paths[counts[0] > counts[1]].name
        report.add(
            f"{paths[0]} has {counts[0]} lines, {paths[1]} has {counts[1]}: both sides need equal counts, "
            f"line N translating line N; look for a lost or split line, {shorter} being the shorter side, "
            "and export both sides together again"
        )
    if not report.total and look_swapped(sample, languages):
        report.add(
            f"{paths[0]} looks like {target} and {paths[1]} like {source}: the languages are swapped; "
            f"rename the files, or give --pair {target}-{source}"
        )


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
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--pair", type=language_pair, metavar="SRC-TGT", help="source and target language, e.g. uk-en")
    kind.add_argument("--language", type=language_code, metavar="CODE", help="text of one language, e.g. en")
    parser.add_argument("--max-chars", type=at_least(1), default=10_000, help="longest line (default 10000)")
    parser.add_argument(
        "prefixes", nargs="*", metavar="PREFIX", help="checks PREFIX.SRC and PREFIX.TGT, or PREFIX.CODE"
    )
    held_out_help = "development and test texts: checked, too, and how much of them the others repeat"
    parser.add_argument("--held-out", nargs="+", default=[], metavar="PREFIX", help=held_out_help)
    out_help = "JSON of lines, words, bytes, and what held-out texts share with others"
    parser.flag("--out", old="--json", help=out_help)
    args = parser.parse_args(argv)
    if not args.prefixes + args.held_out:
        parser.error("give at least one PREFIX")
    return args


@reports_errors("validate")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    languages = args.pair or (args.language,)
    reports = {
        prefix: validate(prefix, *languages, max_chars=args.max_chars) for prefix in args.prefixes + args.held_out
    }
    for prefix, report in reports.items():
        if not report.total:
            sides, what = (f"{{{','.join(args.pair)}}}", "pairs of lines") if args.pair else (args.language, "lines")
            print(f"{prefix}.{sides}: {report.lines} valid {what}")
        for problem in report.problems:
            print(f"validate: error: {problem}", file=sys.stderr)
        if report.total > MAX_LISTED:
            print(
                f"validate: error: {prefix}: {report.total - MAX_LISTED} more problems not listed",
                file=sys.stderr,
            )
    if any(report.total for report in reports.values()):
        return 1
    found = overlaps(args.prefixes, args.held_out, *languages) if args.held_out else {}
    if args.out:
        _write_json(args.out, reports, found)
    told = [_report_overlap(prefix, overlap, args) for prefix, overlap in found.items()]
    return 0 if all(told) else 1


def _write_json(path: str, reports: dict[str, Report], found: dict[str, Overlap]) -> None:
    sizes = [
        {"text": prefix, "lines": report.lines, "words": report.words, "bytes": report.num_bytes}
        for prefix, report in reports.items()
    ]
    content = {
        "texts": sizes,
        "held_out": [{"text": prefix, **asdict(overlap)} for prefix, overlap in found.items()],
    }
    with open_aside([Path(path)]) as (file,):
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _report_overlap(prefix: str, overlap: Overlap, args: argparse.Namespace) -> bool:
    """Print how much of a held-out text the training text repeats. Returns: True if it is not above MAX_OVERLAP."""
    if not overlap.sources:
        return True
    is_little = overlap.pairs <= MAX_OVERLAP * overlap.lines
    told = (
        f"{overlap.pairs} of {overlap.lines} {'pairs' if args.pair else 'lines'} of {prefix} are in the training text"
    )
    if args.pair:
        told += f" ({overlap.sources} by their source)"
        way_out = f"take them out of it with xmoe prepare clean --exclude {prefix}"
    else:
        way_out = f"take them out of it, such as with grep -vxFf {prefix}.{args.language}"
    kind = "warning" if is_little else "error"
    print(f"validate: {kind}: {told}: scores on them say little; {way_out}", file=sys.stderr)
    return is_little


if __name__ == "__main__":
    sys.exit(main())
