"""Write scores.json and report.md of a language model's run from its training log, checkpoint and evaluations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.run.figures import calibrations, kept_of_calibration, resolved_config, training_figures, versions
from eval.run.report_text import routing_table, three_digits, write_report
from eval.run.resume import changes
from eval.run.training_log import read_records
from eval.text import files
from eval.text.units import in_units_of_text, text_sizes
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors

_ROUTED = "Of the averaged checkpoint, on the test set, as trained."
_MEASURES = {
    "loss_bits": "loss (bits a token)",
    "perplexity": "perplexity",
    "word_perplexity": "perplexity a word",
    "bits_per_byte": "bits a byte",
    "flops": "MoE FLOPs / dense",
    "experts": "experts a token",
}


def calibrated_figures(paths: Sequence[str], sizes: dict[str, dict[str, int]], tokens: int) -> dict[str, Any]:
    """The reports of ``eval.calibrate --check-subset test``, by goal such as ``loss:0.01``.

    ``test`` is the setting's evaluation on the test set. A model that has nothing to calibrate adds nothing.

    Args:
        sizes: result of `text_sizes`.
        tokens: number of tokens of the test set.
    """
    found: dict[str, Any] = {}
    for goal, _, report in calibrations(paths):
        after = report["check"]["after"]
        test = {name: after[name] for name in ("loss_bits", "flops", "experts")}
        units = {
            "perplexity": 2 ** after["loss_bits"],
            **in_units_of_text(after["loss_bits"], tokens, sizes.get("test")),
        }
        found[goal] = kept_of_calibration(report) | {"test": test | units}
    return found


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the content of scores.json. Raises: FileNotFoundError, ValueError for a missing or unfinished piece."""
    commit = Path(args.commit_file).read_text(encoding="utf-8").strip() if Path(args.commit_file).is_file() else ""
    training = training_figures(read_records(args.training_log))
    training["changes"] = changes(Path(args.checkpoint).parent)
    routing = training.pop("routing")
    evaluation = files.read_json(args.evaluation)["subsets"]
    test = evaluation["test"]
    if test["routing"]["layers"]:
        routing["test"] = test["routing"]
    text = files.read_json(args.text) if Path(args.text).is_file() else {}
    return {
        "language": args.language,
        "seed": args.seed,
        "commit": commit or None,
        "config_file": args.config,
        "test_set": args.test_set,
        "evaluation": evaluation,
        "calibrated": calibrated_figures(args.calibrated, text_sizes(Path(args.text).parent), test["target_tokens"]),
        "routing": routing,
        "training": training,
        "text": text,
        "versions": versions(),
        **resolved_config(args.checkpoint),
    }


def evaluation_table(report: dict[str, Any]) -> str:
    """A Markdown table of the model as trained on each split, and of the test set at other prices."""
    parts = dict(report["evaluation"])
    parts |= {f"test, {goal}": part["test"] for goal, part in report["calibrated"].items()}
    rows = [[name, *(three_digits(part[figure]) or "–" for figure in _MEASURES)] for name, part in parts.items()]
    return tabulate(rows, ["", *_MEASURES.values()], tablefmt="github", disable_numparse=True)


def sweep_table(report: dict[str, Any]) -> str:
    """A Markdown table of the thresholds; empty if none was evaluated."""
    parts = report["evaluation"]
    rows = [
        [f"{points[0]['threshold']:g}", *(three_digits(points[0][name]) for name in ("flops", "experts"))]
        + [three_digits(point["perplexity"]) for point in points]
        for points in zip(*(part["sweep"] for part in parts.values()), strict=True)
    ]
    headers = ["threshold", "MoE FLOPs / dense", "experts a token", *(f"perplexity, {split}" for split in parts)]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"## Thresholds\n\n{table}\n\nFLOPs and experts are those of {next(iter(parts))}." if rows else ""


def to_markdown(report: dict[str, Any]) -> str:
    """The text of report.md."""
    training, held_out = report["training"], report["text"].get("held_out", [])
    length = f"{training['updates']} updates, {training['epochs']} epochs, {three_digits(training['seconds'])} s"
    facts = {
        "test set": report["test_set"],
        "model": f"{report['config']['model']['_name']}, {report['num_parameters']:,} parameters",
        "configuration": f"{report['config_file']} (resolved: `config` in scores.json)",
        "seed": report["seed"],
        "commit": report["commit"] or "not a git checkout",
        "training": length,
        "training speed": f"{three_digits(training['words_per_second'])} tokens/s",
        "validation loss in training": f"{three_digits(training['valid_loss'])} (best "
        f"{three_digits(training['best_valid_loss'])})",
        "checkpoints averaged": ", ".join(report["averaged_from"] or ["none"]),
        "changed while training": "; ".join(training["changes"]) or "nothing",
        "held-out lines in the training text": ", ".join(
            f"{Path(each['text']).name} {each['pairs']} of {each['lines']}" for each in held_out
        )
        or "not known",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    table = tabulate(facts.items(), ["", "value"], tablefmt="github", disable_numparse=True)
    parts = [
        f"# {report['language']}: {report['config']['model']['_name']}",
        f"## Perplexity\n\n{evaluation_table(report)}",
        sweep_table(report),
        f"## Routing\n\n{routing_table(report, test=_ROUTED)}",
        f"## Run\n\n{table}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parser() -> CommandParser:
    parser = command_parser("lm_report", __doc__, prog="python -m eval.lm_report")
    flag, add = parser.flag, parser.add_argument
    add("--language", required=True, metavar="CODE", help="kept in the report")
    flag("--seed", required=True, help="kept in the report")
    add("--test-set", required=True, metavar="NAME", help="kept in the report")
    add("--config", required=True, metavar="YAML", help="kept in the report")
    flag("--training-log", required=True)
    flag("--checkpoint", required=True, help="the model that was evaluated; holds the configuration")
    add("--evaluation", required=True, metavar="JSON", help="output of xmoe perplexity on valid and test")
    add("--calibrated", nargs="*", default=[], metavar="JSON", help="output of xmoe calibrate --check-subset test")
    add("--text", required=True, metavar="JSON", help="sizes and overlap of the text; may be absent")
    add("--commit-file", required=True, metavar="FILE", help="file that names the commit; may be absent")
    flag("--out", required=True, metavar="DIR", help="folder for scores.json and report.md")
    return parser


@reports_errors("lm_report")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    report = collect(args)
    write_report(args.out, report, to_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
