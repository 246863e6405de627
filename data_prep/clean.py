"""Mend and filter raw parallel text as a stream, in several processes, and report what each rule dropped.

A pair of lines is mended (entities, NFC, invisible characters, white space), then tested by the rules of rules.py in
their order; the first rule that fails drops it. The output has the input's order and does not depend on ``--workers``.
Memory holds a few chunks for each worker, and for duplicates 8 bytes for each kept pair, whatever its length (at most
24 while the store merges, and twice as much for --duplicates either). Hashes of 64 bits lose a good pair by collision
with a probability below 3e-5 in 30 million pairs.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import regex
from tqdm import tqdm

from data_prep.languages import SCRIPTS, language_identifier, script_letters
from data_prep.rules import ALWAYS, MENDS, RULES, Settings, failed_rule, mend
from data_prep.seen import Chunk, Memory, side_hash
from data_prep.textio import DataError, language_pair, require_file, split_lines
from xmoe_fairseq.command_line import CommandParser, at_least, command_parser, reports_errors
from xmoe_fairseq.files import open_aside, sha256_of

CHUNK_LINES = 4000
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clean_chunk(source_block: bytes, target_block: bytes, settings: Settings) -> Chunk:
    """Mend and test equally many lines of both sides. A worker process runs this."""
    dropped: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    lines: list[tuple[bytes, bytes]] = []
    for raw_pair in zip(split_lines(source_block), split_lines(target_block), strict=True):
        try:
            source, target = (mend(raw.decode(), mended) for raw in raw_pair)
        except UnicodeDecodeError:
            dropped["encoding"] += 1
            continue
        if rule := failed_rule(source, target, settings):
            dropped[rule] += 1
        else:
            lines.append((source.encode(), target.encode()))
    digests = b"".join(side_hash(side, pair[side]) for pair in lines for side in (0, 1))
    return Chunk(lines, np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2), dropped, mended)


def read_chunks(source: BinaryIO, target: BinaryIO, names: tuple[Path, Path]) -> Iterator[tuple[bytes, bytes]]:
    """Blocks of CHUNK_LINES whole lines of both sides. Raises: DataError if one side ends first."""
    total = 0
    while True:
        blocks = [list(itertools.islice(file, CHUNK_LINES)) for file in (source, target)]
        if len(blocks[0]) != len(blocks[1]):
            counts = [total + len(blocks[side]) + sum(1 for _ in file) for side, file in enumerate((source, target))]
            raise DataError(
                f"{names[0]} has {counts[0]} lines, {names[1]} has {counts[1]}: both sides need "
                "equal counts; nothing was written; export both again, together"
            )
        if not blocks[0]:
            return
        total += len(blocks[0])
        yield b"".join(blocks[0]), b"".join(blocks[1])


def ordered_map(blocks: Iterable[tuple[bytes, bytes]], settings: Settings, workers: int) -> Iterator[Chunk]:
    """Apply clean_chunk to all blocks, in order, with at most 3 chunks a worker in flight."""
    if workers == 1:
        yield from (clean_chunk(*block, settings) for block in blocks)
        return
    with ProcessPoolExecutor(workers) as pool:
        waiting: deque[Future[Chunk]] = deque()
        for block in blocks:
            waiting.append(pool.submit(clean_chunk, *block, settings))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def clean(
    source: Path, target: Path, out: Path, settings: Settings, *, workers: int, exclude: Sequence[Path]
) -> dict[str, Any]:
    """Clean ``source`` and ``target`` into ``out.SRC`` and ``out.TGT``, which appear only when both are complete.

    Returns: the report, with settings, line counts, what each rule dropped and each mend changed, seconds, sha256.
    Raises: DataError for missing or unequal files, or if no pair is left.
    """
    start, dropped, mended = time.perf_counter(), Counter(), Counter()  # type: ignore[var-annotated]
    memory, num_kept = Memory(settings, exclude), 0
    outputs = [Path(f"{out}.{settings.source}"), Path(f"{out}.{settings.target}")]
    progress = tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc="clean", disable=None)
    with source.open("rb") as source_file, target.open("rb") as target_file, open_aside(outputs) as files:
        chunks = ordered_map(read_chunks(source_file, target_file, (source, target)), settings, workers)
        for chunk in chunks:
            kept = memory.keep(chunk)
            for side, file in enumerate(files):
                file.writelines(pair[side] + b"\n" for pair, keep in zip(chunk.lines, kept, strict=True) if keep)
            num_kept += int(kept.sum())
            dropped.update(chunk.dropped)
            mended.update(chunk.mended)
            progress.update(source_file.tell() - progress.n)
        progress.close()
        if not num_kept:
            raise DataError(
                f"no pair of {source} is left ({dict(+dropped)}); nothing was written; see --help for limits"
            )
    return {
        "settings": asdict(settings),
        "lines_in": num_kept + sum(dropped.values()),
        "lines_out": num_kept,
        "dropped": {rule: dropped[rule] for rule in RULES},
        "mended_lines": {name: mended[name] for name in MENDS},
        "seconds": round(time.perf_counter() - start, 2),
        "workers": workers,
        "sha256": {path.name: sha256_of(path) for path in outputs},
    }


def print_report(report: dict[str, Any]) -> None:
    lines_in = report["lines_in"]
    print(f"{'rule':<12}{'dropped':>12}{'share':>9}")
    for rule, count in report["dropped"].items():
        print(f"{rule:<12}{count:>12}{count / lines_in:>9.2%}")
    print(f"{'kept':<12}{report['lines_out']:>12}{report['lines_out'] / lines_in:>9.2%}   of {lines_in} pairs")
    mends = ", ".join(f"{name} {count}" for name, count in report["mended_lines"].items())
    print(f"mended lines (both sides, before the rules): {mends}")


def script_name(text: str) -> tuple[str, str]:
    language, _, script = text.partition("=")
    try:
        script_letters(script)
    except regex.error:
        script = ""
    if not language or not script:
        raise argparse.ArgumentTypeError(f"wants LANGUAGE=Script with a Unicode script, such as th=Thai; got {text!r}")
    return language, script


def bounded_number(minimum: float, maximum: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"must be a number from {minimum:g} to {maximum:g}, got {text!r}")
        return value

    return parse


def _add_rule_settings(add: Callable[..., Any]) -> None:
    can_be_left_out = [rule for rule in RULES if rule not in ALWAYS]
    add("--skip", nargs="+", default=[], choices=can_be_left_out, help="rules to leave out")
    add("--min-words", type=at_least(1), default=1, help="default 1; not counted for ja, th, zh")
    add("--max-words", type=at_least(1), default=200, help="default 200; not counted for ja, th, zh")
    add("--max-chars", type=at_least(1), default=1000, help="default 1000")
    ratio_help = "longest allowed ratio of expected lengths (default 3)"
    add("--max-ratio", type=bounded_number(1, 1000), default=3.0, help=ratio_help)
    script_help = "share of letters in the script (default 0.5)"
    add("--min-script", type=bounded_number(0, 1), default=0.5, help=script_help)
    add("--script", type=script_name, action="append", default=[], help="script of a language: LANGUAGE=Script")
    add("--language-id", choices=("none", "py3langid"), default="none", help="default none; see docs/data.md")
    sure_help = "how sure identification must be of another language to drop (default 0.8)"
    add("--min-confidence", type=bounded_number(0, 1), default=0.8, help=sure_help)
    duplicate_choices = ("pair", "source", "target", "either", "none")
    add("--duplicates", choices=duplicate_choices, default="pair", help="what may not repeat (default pair)")
    held_out = "held-out texts, such as the test sets"
    add("--exclude", nargs="+", default=[], type=Path, metavar="PREFIX", help=held_out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    rules = "\n".join(f"  {rule:<10} {text}" for rule, text in RULES.items())
    parser = command_parser(
        "prepare clean",
        "Mend and filter PREFIX.SRC and PREFIX.TGT. Exit: 0 done, 1 failed, 2 bad arguments.\n"
        f"rules, in their order; a pair is dropped if\n{rules}",
    )
    flag, add = parser.flag, parser.add_argument
    flag("--pair", type=language_pair, required=True)
    flag("--input", required=True, metavar="PREFIX", help="reads PREFIX.SRC and PREFIX.TGT")
    written = "writes PREFIX.SRC, PREFIX.TGT and PREFIX.report.json"
    flag("--out", old="--output", required=True, metavar="PREFIX", help=written)
    _add_rule_settings(add)
    flag("--workers", default=NUM_CORES, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    check_together(parser, args)
    return args


def check_together(parser: CommandParser, args: argparse.Namespace) -> None:
    """Refuse settings that contradict each other; look up the scripts of the two languages."""
    if args.min_words > args.max_words:
        parser.error(f"--min-words {args.min_words} must not be above --max-words {args.max_words}")
    if Path(args.input).resolve() == Path(args.out).resolve():
        parser.error(f"--out {args.out}: is the input; give another prefix, so that the raw text stays")
    known = {**SCRIPTS, **dict(args.script)}
    for language in args.pair:
        if language not in known and "script" not in args.skip:
            parser.error(f"no script known for {language!r}; give --script {language}=NAME, or --skip script")
    args.scripts = [known.get(language, "") for language in args.pair]


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        source=args.pair[0],
        target=args.pair[1],
        source_script=args.scripts[0],
        target_script=args.scripts[1],
        skip=tuple(sorted(set(args.skip))),
        min_words=args.min_words,
        max_words=args.max_words,
        max_chars=args.max_chars,
        max_ratio=args.max_ratio,
        min_script=args.min_script,
        language_id=args.language_id,
        min_confidence=args.min_confidence,
        duplicates=args.duplicates,
    )


@reports_errors("clean")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    settings = settings_of(args)
    if settings.language_id != "none":
        language_identifier()  # a missing package shows here, not in a worker
    source, target = (require_file(Path(f"{args.input}.{language}"), "raw text") for language in args.pair)
    exclude = [] if "held_out" in settings.skip else args.exclude
    report = clean(source, target, Path(args.out), settings, workers=args.workers, exclude=exclude)
    with open_aside([Path(f"{args.out}.report.json")]) as (file,):
        file.write((json.dumps(report, indent=2) + "\n").encode())
    print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
