"""Draw N pairs of lines of parallel text at random by a seed, and keep their order.

Every set of N pairs is equally likely, and the same seed gives the same pairs on any machine. The text is read twice,
once to count; memory holds a few thousand lines. A text of at most N pairs is copied whole.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.textio import DataError, language_pair, require_file
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.files import open_aside, sha256_of

CHUNK_LINES = 10_000


def count_lines(path: Path) -> int:
    """Lines of a file; a last line without LF counts."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def chosen_in_chunks(total: int, wanted: int, seed: int) -> Iterator[np.ndarray]:
    """Yield a bool array for each CHUNK_LINES lines of ``total``: True for the lines that are drawn, ``wanted`` in all.

    The number of lines from a chunk is a hypergeometric draw, and its lines are a choice without repeats. Together
    they are a uniform sample that never holds ``total`` numbers.
    """
    random = np.random.default_rng(seed)
    for start in range(0, total, CHUNK_LINES):
        size = min(CHUNK_LINES, total - start)
        later = total - start - size
        number = wanted if not later else int(random.hypergeometric(size, later, wanted)) if wanted else 0
        chosen = np.zeros(size, dtype=bool)
        chosen[random.choice(size, number, replace=False)] = True
        wanted -= number
        yield chosen


def sample(paths: Sequence[Path], outputs: Sequence[Path], max_pairs: int, seed: int) -> dict[str, Any]:
    """Write the sample of both sides; the files appear only when both are complete.

    Returns: the report. Raises: DataError for missing, empty or unequal files.
    """
    totals = [count_lines(require_file(path, "text")) for path in paths]
    if totals[0] != totals[1]:
        raise DataError(f"{paths[0]} has {totals[0]} lines, {paths[1]} has {totals[1]}: both sides need equal counts")
    wanted = min(max_pairs, totals[0])
    with open_aside(outputs) as files:
        for path, file in zip(paths, files, strict=True):
            with path.open("rb") as text:
                for chosen in chosen_in_chunks(totals[0], wanted, seed):
                    lines = itertools.islice(text, len(chosen))
                    file.writelines(
                        line if line.endswith(b"\n") else line + b"\n" for line in itertools.compress(lines, chosen)
                    )
    return {
        "lines_in": totals[0],
        "lines_out": wanted,
        "max_pairs": max_pairs,
        "seed": seed,
        "sha256": {path.name: sha256_of(path) for path in outputs},
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("prepare sample", __doc__)
    parser.flag("--pair", type=language_pair, required=True)
    parser.flag("--input", required=True, metavar="PREFIX", help="reads PREFIX.SRC and PREFIX.TGT")
    parser.flag("--out", required=True, metavar="PREFIX", help="writes PREFIX.SRC, PREFIX.TGT and PREFIX.report.json")
    parser.add_argument("--max-pairs", type=at_least(1), required=True, metavar="N", help="pairs to take")
    parser.flag("--seed", type=at_least(0), default=1)
    args = parser.parse_args(argv)
    if Path(args.input).resolve() == Path(args.out).resolve():
        parser.error(f"--out {args.out}: is the input; give another prefix")
    return args


@reports_errors("sample")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    paths, outputs = ([Path(f"{prefix}.{code}") for code in args.pair] for prefix in (args.input, args.out))
    report = sample(paths, outputs, args.max_pairs, args.seed)
    with open_aside([Path(f"{args.out}.report.json")]) as (file,):
        file.write((json.dumps(report, indent=2) + "\n").encode())
    print(
        f"{report['lines_out']} of {report['lines_in']} pairs, seed {args.seed}: {args.out}.{{{','.join(args.pair)}}}"
    )
    if report["lines_in"] < args.max_pairs:
        print(f"sample: warning: fewer pairs than the {args.max_pairs} asked for", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
