"""Check that the scorer reproduces the published scores of WMT22 systems, to 1e-6.

xmoe oracle --folder DIR [--references DIR]

DIR holds published.tsv (columns pair, system, bleu_published, chrf_published) and the outputs PAIR.SYSTEM.TGT. The
references are wmt22.PAIR.TGT in --references (default: DIR/../../tests).
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from eval.text import files
from eval.text.scoring import score_corpus
from xmoe_fairseq.command_line import command_parser, reports_errors

TOLERANCE = 1e-6
_METRICS = ("bleu", "chrf")


def check_oracle(folder: Path, references: Path) -> list[tuple[str, dict[str, float]]]:
    """Compare our score of each system with the published one.

    Returns: [("PAIR SYSTEM", {"bleu": |ours - published|, "chrf": ...})], absolute, in points of 0 to 100.
    Raises: FileNotFoundError or ValueError where a file is missing or broken.
    """
    table = csv.DictReader(files.read_lines(folder / "published.tsv"), delimiter="\t")
    rows = list(table)
    if missing := {"pair", "system", *(f"{name}_published" for name in _METRICS)} - set(table.fieldnames or ()):
        raise ValueError(f"{folder / 'published.tsv'}: has no column {', '.join(sorted(missing))}")
    differences = []
    for row in tqdm(rows, desc="oracle", unit="system"):
        pair, target = row["pair"], row["pair"].split("-")[1]
        # one published system starts with a byte order mark and was scored with it
        hypotheses = files.read_lines(folder / f"{pair}.{row['system']}.{target}", strict=False)
        reference = files.read_lines(references / f"wmt22.{pair}.{target}")
        scores = score_corpus(hypotheses, [reference], target_language=target, names=_METRICS)
        found = {name: abs(scores[name].score - float(row[f"{name}_published"])) for name in _METRICS}
        differences.append((f"{pair} {row['system']}", found))
    return differences


@reports_errors("check_oracle")
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("oracle", __doc__)
    parser.add_argument("--folder", required=True, type=Path, metavar="DIR", help="published systems of WMT22")
    parser.flag("--references", type=Path, metavar="DIR", help="their references (default: tests/ two folders up)")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"--folder: no such folder: {args.folder}")
    differences = check_oracle(args.folder, args.references or args.folder / ".." / ".." / "tests")
    if not differences:
        print(f"check_oracle: error: {args.folder / 'published.tsv'} lists no system", file=sys.stderr)
        return 1
    bad = [f"{name}: {found}" for name, found in differences if max(found.values()) > TOLERANCE]
    largest = {name: max(found[name] for _, found in differences) for name in _METRICS}
    print(f"check_oracle: {len(differences) - len(bad)} of {len(differences)} systems within {TOLERANCE}")
    print(f"check_oracle: largest difference: BLEU {largest['bleu']:.3g}, chrF2 {largest['chrf']:.3g}")
    for line in bad:
        print(f"check_oracle: error: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
