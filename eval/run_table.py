"""One table of several runs of scripts/run_pair.sh, from their scores.json."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.text import files
from xmoe_fairseq.command_line import command_parser, reports_errors

_HEADERS = (
    "run",
    "BLEU",
    "chrF2++",
    "parameters",
    "experts per token",
    "MoE FLOPs / dense",
    "train words/s",
    "valid loss",
)


def row(folder: str) -> list[str]:
    """One run's cells. Raises: FileNotFoundError, ValueError if ``folder`` has no complete scores.json."""
    path = Path(folder) / "scores.json"
    report = files.read_json(path)
    if "language" in report:
        raise ValueError(
            f"{path}: a language model's run, which has no BLEU; xmoe report lays perplexities side by side"
        )
    try:
        # without an analysis scores.json has only the routing of the last validation
        routing, training = report["routing"]["valid"]["overall"], report["training"]
        inference = report.get("inference") or {
            "experts_per_token": routing.get("used"),
            "relative_flops": routing.get("flops"),
        }
        scores = [report["scores"][metric]["score"] for metric in ("bleu", "chrf++")]
        return [
            Path(folder).name,
            *(f"{score:.2f}" for score in scores),
            f"{report['num_parameters']:,}",
            _cell(inference["experts_per_token"]),
            _cell(inference["relative_flops"]),
            _cell(training["words_per_second"], 0),
            _cell(training["valid_loss"], 3),
        ]
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; run scripts/run_pair.sh again to write it anew") from None


def _cell(value: Any, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@reports_errors("run_table")
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("runs", __doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="--out of a run of scripts/run_pair.sh")
    args = parser.parse_args(argv)
    rows = [row(folder) for folder in args.folders]
    print(tabulate(rows, _HEADERS, tablefmt="github", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
