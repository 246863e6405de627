"""Write one HTML page about a run, or a comparison of runs: scores, curves, routing figures, routing explorer.

xmoe report runs/demo/uk-en/xmoe [MORE_RUNS...] --out report.html

A run is a folder with analysis.json (xmoe analyse) and, from xmoe run, scores.json; either may be
missing. NAME=FOLDER gives it another name. The page opens offline and uses no network.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from eval.page.render import render
from eval.run.record import load_run
from eval.text import files
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors


def _benchmarks(path: str | None) -> list[dict[str, Any]]:
    """Timed rows with FLOPs of a result file of benchmarks/; of several sweeps those of the one over FLOPs."""
    if path is None:
        return []
    rows = files.read_json(path).get("rows") or []
    rows = [row for row in rows if row.get("sweep", "flops").startswith("flops")]
    timed = [row for row in rows if row.get("flops") is not None and row.get("ms") is not None]
    if not timed:
        raise ValueError(f"{path}: no row has both flops (relative to the dense FFN) and ms; is it of benchmarks/?")
    return timed


def _parser() -> CommandParser:
    parser = command_parser("report", __doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="folder with analysis.json and scores.json, or an analysis JSON",
    )
    parser.flag("--out", old="--output", required=True, help="the HTML page to write")
    add("--title", metavar="TEXT", help="heading of the page (default: the names of the runs)")
    add("--benchmarks", metavar="JSON", help="result of benchmarks/ with flops and ms a row: wall time against FLOPs")
    return parser


@reports_errors("report")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    files.check_writable(args.out)
    runs = [load_run(text) for text in args.runs]
    title = args.title or " and ".join(run.name for run in runs)
    page = render(runs, title=title, benchmarks=_benchmarks(args.benchmarks))
    files.write_text(args.out, page)
    print(f"report: {args.out}, {len(page.encode()) / 1e6:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
