"""Write scores.json and report.md of one run from its training log, checkpoint, translations and scores."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from eval.run.evidence import at_length_limit, cost_line, data_figures, evidence_rows, inference_figures, routing_of
from eval.run.flops import flops_per_token
from eval.run.training_log import LAYER_FIGURE, Record, last_figures, layer_order, read_records
from eval.run.training_settings import changes
from eval.score import format_table
from eval.text import files
from xmoe_fairseq.checkpoints.structure import count_parameters
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors

_SPEED = re.compile(r"Translated ([\d,]+) sentences \(([\d,]+) tokens\) in ([\d.]+)s")
_PACKAGES = ("torch", "fairseq-fixed", "fairseq", "sacrebleu", "sentencepiece", "subword-nmt")
_ROUTED = {
    "test": "Of the checkpoint that translated, on the test set (teacher forcing), with the settings of the "
    "translation; report.html shows the same.",
    "valid": "Of the last validation in the training log: the checkpoint of then, on the validation set.",
    "train": "Of the last epoch in the training log: the model of then, on the training text, with capacity.",
}
_WHAT = {
    "wanted": "experts a token asked for",
    "used": "experts a token got",
    "dropped": "share of those asked for that capacity dropped",
    "load_cv": "load per expert, standard deviation / mean",
    "entropy": "router entropy",
    "balance": "balance loss",
    "flops": "FLOPs of the MoE layers / of the dense FFN",
}


def routing_figures(figures: dict[str, float]) -> dict[str, Any]:
    """Sort the keys that start with ``moe_`` into overall and per-layer figures.

    Args:
        figures: one record of the training log, e.g. ``{"moe_used": 2.1, "moe_encoder1_used": 2.3}``.
    Returns:
        ``{"overall": {figure: value}, "layers": {"encoder 1": {figure: value}}}``; a dense model has neither.
    """
    overall: dict[str, float] = {}
    layers: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        if found := LAYER_FIGURE.fullmatch(key):
            side, index, figure = found.groups()
            layers.setdefault(f"{side} {index}", {})[figure] = value
        elif key.startswith("moe_"):
            overall[key.removeprefix("moe_")] = value
    return {"overall": overall, "layers": {name: layers[name] for name in sorted(layers, key=layer_order)}}


def training_figures(records: Sequence[Record]) -> dict[str, Any]:
    """What the training came to. Raises: ValueError if the log holds no end of an epoch."""
    train, valid = last_figures(records, "train"), last_figures(records, "valid")
    if not train:
        raise ValueError("the training log holds no figures; was it written with common.log_format=json?")
    validations = [record.figures for record in records if record.kind == "valid"]
    losses = [figures["loss"] for figures in validations if "loss" in figures]
    likelihoods = [figures.get("nll_loss", figures["loss"]) for figures in validations if "loss" in figures]
    return {
        "updates": int(train["num_updates"]),
        "epochs": int(train["epoch"]),
        "seconds": train.get("wall"),
        "words_per_second": train.get("wps"),
        "train_loss": train.get("loss"),
        "valid_loss": valid.get("loss"),
        "valid_perplexity": valid.get("ppl"),
        "best_valid_loss": min(losses, default=None),
        "best_valid_nll_loss": min(likelihoods, default=None),
        "routing": {"train": routing_figures(train), "valid": routing_figures(valid)},
    }


def generation_speed(paths: Sequence[str]) -> dict[str, float | None]:
    """Sentences, target tokens and seconds out of fairseq-generate's standard error and standard output.

    The summary line goes to either, depending on whether fairseq or hydra configured logging first.
    Raises: FileNotFoundError; ValueError if no file has the summary line, that is, translation did not end.
    """
    text = "\n".join(files.read_bytes(path).decode("utf-8", errors="replace") for path in paths)
    found = _SPEED.search(text)
    if not found:
        raise ValueError(f"{', '.join(paths)}: no line 'Translated ... sentences'; translate again")
    sentences, tokens, seconds = (float(group.replace(",", "")) for group in found.groups())
    rate = tokens / seconds if seconds else None
    return {"sentences": sentences, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate}


def resolved_config(checkpoint: str | Path) -> dict[str, Any]:
    """The configuration that fairseq kept in a checkpoint, its parameters, FLOPs per token, and what was averaged."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    config = _plain(state["cfg"])
    return {
        "config": config,
        "num_parameters": count_parameters(state["model"])["total"],
        "flops_per_token": flops_per_token(state["model"], config["model"]),
        "averaged_from": (state.get("extra_state") or {}).get("averaged_from"),
    }


def _plain(value: Any) -> Any:
    """The same value made of what JSON has; an argparse.Namespace becomes a dictionary."""
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def calibrated_figures(paths: Sequence[str]) -> dict[str, Any]:
    """What ``eval.calibrate`` reports say, and the scores beside them, by goal such as ``loss:0.01``.

    A report of a model that has nothing to calibrate adds nothing.
    """
    found: dict[str, Any] = {}
    for path in paths:
        report = files.read_json(path)
        if report["after"] is None:
            continue
        (kind, value), *_ = report["goal"].items()
        score = files.read_json(path.removesuffix(".json") + ".score.json")
        found[f"{kind.removeprefix('max_')}:{value:g}"] = {
            **{name: report[name] for name in ("before", "after", "budget_met")},
            "scores": score["scores"],
            "hypotheses": score["hypotheses"],
        }
    return found


def versions() -> dict[str, str]:
    """Python and the packages that decide a score; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """The content of scores.json. Raises: FileNotFoundError, ValueError for a missing or unfinished piece."""
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
        routing["test"] = routing_of(analysis, _WHAT)
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
        "routing": routing,
        "training": training,
        "generation": generation_speed(args.generation_log) | _length_limit(args, resolved["config"]),
        "calibrated": calibrated_figures(args.calibrated),
        "versions": versions(),
        **evidence,
        **resolved,
    }


def _length_limit(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """How many translations reached the most tokens allowed, in all of fairseq-generate's output given."""
    most = {"max_len_a": args.max_len_a, "max_len_b": args.max_len_b}
    positions = config.get("model", {}).get("max_target_positions") or 1024
    reached = 0
    for path in args.generation_log:
        with open(path, encoding="utf-8", errors="replace") as lines:
            reached += at_length_limit(lines, **most, positions=positions)
    return most | {"at_length_limit": reached}


def samples(report: dict[str, Any], count: int) -> list[tuple[str, str, str]]:
    """Source, reference and translation of ``count`` lines spread evenly over the test set."""
    columns = [
        files.read_lines(path)
        for path in (report["source"], report["references"][0]["path"], report["hypotheses"]["path"])
    ]
    rows = list(zip(*columns, strict=True))
    step = max(1, len(rows) // max(1, count))
    return rows[::step][:count]


def routing_table(report: dict[str, Any]) -> str:
    """Markdown table of the routing per layer, saying of which checkpoint and which text.

    That of the analysis, which report.html shows too; without one, that of the training log.
    """
    routing = report["routing"]
    name = next((name for name in ("test", "valid") if routing.get(name, {}).get("layers")), "train")
    if not routing[name]["layers"]:
        return "No MoE layer: every token goes through one dense feed-forward network."
    rows = {**routing[name]["layers"], "all layers": routing[name]["overall"]}
    names = [figure for figure in _WHAT if any(figure in figures for figures in rows.values())]
    body = [[layer, *(_cell(figures.get(figure)) for figure in names)] for layer, figures in rows.items()]
    table = tabulate(body, ["layer", *names], tablefmt="github", disable_numparse=True)
    legend = "; ".join(f"{figure}: {_WHAT[figure]}" for figure in names)
    return f"{_ROUTED[name]}\n\n{table}\n\n{legend}."


def price_table(report: dict[str, Any]) -> str:
    """Markdown table of the model as trained and at other prices of inference; empty where there are none."""
    if not report["calibrated"]:
        return ""
    before = next(iter(report["calibrated"].values()))["before"]
    rows = []
    for name, figures, scores in (
        ("as trained", before, report["scores"]),
        *((goal, part["after"], part["scores"]) for goal, part in report["calibrated"].items()),
    ):
        threshold, limit = figures["moe_threshold"], figures["moe_max_experts"]
        shown = ", ".join(f"{t:.4g}" for t in (threshold if isinstance(threshold, list) else [threshold]))
        row = [
            name,
            shown,
            "none" if limit is None else str(limit),
            _cell(figures["flops"]),
            _cell(figures["loss_bits"]),
        ]
        rows.append([*row, *(f"{scores[metric]['score']:.2f}" for metric in ("bleu", "chrf++"))])
    headers = ["", "threshold", "most experts", "MoE FLOPs / dense", "validation loss (bits)", "BLEU", "chrF2++"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"## Price of inference\n\n{table}\n\nThe models are in calibrated/, for every command without flags.\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def summary(report: dict[str, Any], num_samples: int) -> str:
    """Scores, sample translations and routing: what a terminal shows at the end of a run."""
    shown = [
        f"source       {source}\nreference    {reference}\ntranslation  {hypothesis}"
        for source, reference, hypothesis in samples(report, num_samples)
    ]
    parts = ["## Scores", format_table(report), cost_line(report), "## Translations", "```", "\n\n".join(shown), "```"]
    return "\n\n".join([*filter(None, parts), "## Routing", routing_table(report)]) + "\n"


def to_markdown(report: dict[str, Any]) -> str:
    """The whole of report.md."""
    training, generation = report["training"], report["generation"]
    length = f"{training['updates']} updates, {training['epochs']} epochs, {_cell(training['seconds'])} s"
    facts = {
        "test set": report["test_set"] or "not named",
        "model": f"{report['config']['model']['_name']}, {report['num_parameters']:,} parameters",
        "configuration": f"{report['config_file']} (resolved: `config` in scores.json)",
        "seed": report["seed"],
        "commit": report["commit"] or "not a git checkout",
        "training": length,
        "training speed": f"{_cell(training['words_per_second'])} target words/s",
        "validation loss": f"{_cell(training['valid_loss'])} (best {_cell(training['best_valid_loss'])})",
        "translation speed": f"{_cell(generation['tokens_per_second'])} target tokens/s",
        "translations": report["hypotheses"]["path"],
        **evidence_rows(report),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    table = tabulate(facts.items(), ["", "value"], tablefmt="github", disable_numparse=True)
    title = f"# {report['pair']}: {report['config']['model']['_name']}"
    parts = [title, summary(report, 5).rstrip(), price_table(report).rstrip(), f"## Run\n\n{table}"]
    return "\n\n".join(part for part in parts if part) + "\n"


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
    files.write_json(Path(args.out) / "scores.json", report)
    files.write_text(Path(args.out) / "report.md", to_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
