"""Test whether systems differ by more than chance, by sacreBLEU's paired tests, for any number of systems.

xmoe compare --references REF --systems NAME=FILE NAME=FILE ... --method bootstrap

The first system is the baseline, against which each other one is tested. A p-value below 0.05 says that the two
systems differ, not which one is better; with many systems one in twenty falls below it by chance. A system with the
baseline's text has p = 1 (sacreBLEU itself gives the smallest p-value there).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import sacrebleu

from eval.text import files, metrics
from eval.text.significance import METHODS, compare_systems, format_table
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors
from xmoe_fairseq.files import keep_inputs


def _parse_systems(items: Sequence[str]) -> list[tuple[str, str]]:
    systems = []
    for item in items:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise ValueError(f"--systems {item!r}: expected NAME=FILE")
        systems.append((name, path))
    return systems


def _parser() -> CommandParser:
    parser = command_parser("compare", __doc__)
    flag, add = parser.flag, parser.add_argument
    flag("--references", required=True, nargs="+")
    add("--systems", required=True, nargs="+", metavar="NAME=FILE", help="the first is the baseline")
    add("--method", required=True, choices=METHODS)
    add("--metrics", nargs="+", choices=metrics.METRICS, default=["bleu", "chrf++"])
    flag("--target-lang", old="--target-language", default="en", help="chooses BLEU's tokenizer")
    add("--trials", type=int, default=0, metavar="N", help="default: 1000 (bootstrap), 10000 (randomisation)")
    flag("--seed", help="positive (default: SACREBLEU_SEED, else 12345)")
    flag("--workers", old="--processes", default=1, help="systems tested at the same time")
    flag("--out", old="--json", help="a JSON of all figures, unrounded")
    return parser


def _compare_files(args: argparse.Namespace) -> dict[str, Any]:
    paths = _parse_systems(args.systems)
    systems = [(name, files.read_lines(path)) for name, path in paths]
    references = [files.read_lines(path) for path in args.references]
    report = compare_systems(
        systems,
        references,
        method=args.method,
        target_language=args.target_lang,
        names=args.metrics,
        trials=args.trials,
        seed=args.seed,
        processes=args.workers,
    )
    for entry, (_, path), (_, lines) in zip(report["systems"], paths, systems, strict=True):
        entry["hypotheses"] = files.describe_file(path, lines)
    return report | {
        "references": [files.describe_file(p, ref) for p, ref in zip(args.references, references, strict=True)],
        "target_language": args.target_lang,
        "sacrebleu_version": sacrebleu.__version__,
    }


@reports_errors("compare")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.out:
        keep_inputs(args.out, *args.references, *(path for _, path in _parse_systems(args.systems)))
        files.check_writable(args.out)
    report = _compare_files(args)
    if args.out:
        files.write_json(args.out, report)
    for system in report["systems"]:
        if system["same_text_as_baseline"]:
            name = system["name"]
            print(f"compare: warning: {name} is the baseline's very text", file=sys.stderr)
    print(format_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
