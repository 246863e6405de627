"""Write scores.json and report.md of one run from its training log, checkpoint, translations and scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.run.evidence import at_length_limit, data_figures, inference_figures, routing_of
from eval.run.figures import calibrated_figures, generation_speed, resolved_config, training_figures, versions
from eval.run.report_text import ROUTING_FIGURES, to_markdown, write_report
from eval.run.resume import changes
from eval.run.training_log import read_records
from eval.text import files
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the content of scores.json. Raises: FileNotFoundError, ValueError for a missing or unfinished piece."""
    score = files.read_json(args.score)
    commit = Path(args.commit_file).read_text(encoding="utf-8").strip() if Path(args.commit_file).is_file() else ""
    training = training_figures(read_records(args.training_log))
    training["changes"] = changes(Path(args.checkpoint).parent)
    resolved = resolved_config(args.checkpoint)
    evidence: dict[str, Any] = {}
    if args.data:
        names = ("lengths", "overlap", "corpora", "cut")
        evidence["data"] = data_figures(args.data, args.pair, **{name: getattr(args, name) for name in names})
    routing = training.pop("routing")
    if args.analysis:
        analysis = files.read_json(args.analysis)
        evidence["inference"] = inference_figures(analysis) | {"model_overrides": args.model_overrides}
        routing["test"] = routing_of(analysis, ROUTING_FIGURES)
    valid = files.read_json(args.evaluation)["subsets"]["valid"]
    return {
        "pair": args.pair,
        "seed": args.seed,
        "commit": commit or None,
        "config_file": args.config,
        "target_language": score["target_language"],
        "test_set": score["test_set"],
        "scores": score["scores"],
        "hypotheses": score["hypotheses"],
        "references": score["references"],
        "source": args.source,
        "evaluation": {"valid": valid},
        "routing": routing,
        "training": training,
        "generation": generation_speed(args.generation_log) | _length_limit(args, resolved["config"]),
        "calibrated": calibrated_figures(args.calibrated),
        "versions": versions(),
        **evidence,
        **resolved,
    }


def _length_limit(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Count the translations of fairseq-generate's output files that reached the most tokens allowed."""
    most = {"max_len_a": args.max_len_a, "max_len_b": args.max_len_b}
    positions = config.get("model", {}).get("max_target_positions") or 1024
    reached = 0
    for path in args.generation_log:
        with open(path, encoding="utf-8", errors="replace") as lines:
            reached += at_length_limit(lines, **most, positions=positions)
    return most | {"at_length_limit": reached}


def _parser() -> CommandParser:
    parser = command_parser("run_report", __doc__, prog="python -m eval.run_report")
    flag, add = parser.flag, parser.add_argument
    flag("--pair", required=True, help="kept in the report")
    flag("--seed", required=True, help="kept in the report")
    add("--config", required=True, metavar="YAML", help="kept in the report")
    flag("--training-log", required=True)
    flag("--checkpoint", required=True, help="the model that translated; holds the configuration")
    add(
        "--generation-log",
        required=True,
        nargs="+",
        metavar="FILE",
        help="fairseq-generate's stderr and stdout",
    )
    add("--score", required=True, metavar="JSON", help="output of xmoe score --out")
    add("--evaluation", required=True, metavar="JSON", help="output of xmoe perplexity on valid")
    flag("--source", required=True, help="source side of the test set, for the samples")
    add(
        "--calibrated",
        nargs="*",
        default=[],
        metavar="JSON",
        help="output of xmoe calibrate --report, scored beside it",
    )
    add("--commit-file", required=True, metavar="FILE", help="file that names the commit; may be absent")
    add("--analysis", metavar="JSON", help="output of xmoe analyse: the routing table, and what inference costs")
    flag("--model-overrides", default="{}", help="those of the translation; kept in the report")
    flag("--data", help="binary data of the training: its number of pairs")
    add("--lengths", metavar="JSON", help="output of data_prep.lengths; may be absent, like the next three")
    add("--overlap", metavar="JSON", help="output of data_prep.validate --held-out")
    add("--cut", metavar="JSON", help="report of data_prep.subwords encode --max-length on the test set's source")
    add("--corpora", metavar="TSV", help="corpora.tsv of data_prep/download_wmt23.sh")
    add("--max-len-a", type=float, default=0.0, metavar="X", help="of the translation (default 0)")
    add("--max-len-b", type=int, default=200, metavar="N", help="of the translation (default 200)")
    flag("--out", required=True, metavar="DIR", help="folder for scores.json and report.md")
    return parser


@reports_errors("run_report")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    report = collect(args)
    write_report(args.out, report, to_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
