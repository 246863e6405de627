"""Write report.md of one run from scores.json: scores, sample translations, routing and the facts of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.run.evidence import cost_line, evidence_rows
from eval.text import files
from eval.text.scoring import format_table

_ROUTED = {
    "test": "Of the checkpoint that translated, on the test set (teacher forcing), with the settings of the "
    "translation; report.html shows the same.",
    "valid": "Of the last validation in the training log: the checkpoint of then, on the validation set.",
    "train": "Of the last epoch in the training log: the model of then, on the training text, with capacity.",
}
ROUTING_FIGURES = {
    "wanted": "experts a token asked for",
    "used": "experts a token got",
    "dropped": "share of those asked for that capacity dropped",
    "load_cv": "load per expert, standard deviation / mean",
    "entropy": "router entropy",
    "balance": "balance loss",
    "flops": "FLOPs of the MoE layers / of the dense FFN",
}


def to_markdown(report: dict[str, Any]) -> str:
    """The text of report.md."""
    training, generation = report["training"], report["generation"]
    length = f"{training['updates']} updates, {training['epochs']} epochs, {three_digits(training['seconds'])} s"
    facts = {
        "test set": report["test_set"] or "not named",
        "model": f"{report['config']['model']['_name']}, {report['num_parameters']:,} parameters",
        "configuration": f"{report['config_file']} (resolved: `config` in scores.json)",
        "seed": report["seed"],
        "commit": report["commit"] or "not a git checkout",
        "training": length,
        "training speed": f"{three_digits(training['words_per_second'])} target words/s",
        "validation loss, bits a token": f"{three_digits(report['evaluation']['valid']['loss_bits'])}",
        "training's loss there, smoothed": f"{three_digits(training['valid_loss'])} (best "
        f"{three_digits(training['best_valid_loss'])})",
        "translation speed": f"{three_digits(generation['tokens_per_second'])} target tokens/s",
        "translations": report["hypotheses"]["path"],
        **evidence_rows(report),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    table = tabulate(facts.items(), ["", "value"], tablefmt="github", disable_numparse=True)
    title = f"# {report['pair']}: {report['config']['model']['_name']}"
    parts = [title, summary(report, 5).rstrip(), price_table(report).rstrip(), f"## Run\n\n{table}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_report(folder: str, report: dict[str, Any], markdown: str) -> None:
    """Write scores.json and report.md of a run."""
    files.write_json(Path(folder) / "scores.json", report)
    files.write_text(Path(folder) / "report.md", markdown)


def summary(report: dict[str, Any], num_samples: int) -> str:
    """Scores, sample translations and routing, which a terminal shows at the end of a run."""
    shown = [
        f"source       {source}\nreference    {reference}\ntranslation  {hypothesis}"
        for source, reference, hypothesis in samples(report, num_samples)
    ]
    parts = ["## Scores", format_table(report), cost_line(report), "## Translations", "```", "\n\n".join(shown), "```"]
    return "\n\n".join([*filter(None, parts), "## Routing", routing_table(report)]) + "\n"


def samples(report: dict[str, Any], count: int) -> list[tuple[str, str, str]]:
    """Source, reference and translation of ``count`` lines spread evenly over the test set."""
    columns = [
        files.read_lines(path)
        for path in (report["source"], report["references"][0]["path"], report["hypotheses"]["path"])
    ]
    rows = list(zip(*columns, strict=True))
    step = max(1, len(rows) // max(1, count))
    return rows[::step][:count]


def routing_table(report: dict[str, Any], test: str = _ROUTED["test"]) -> str:
    """A Markdown table of the routing per layer, with the checkpoint and the text that it belongs to.

    It is the routing on the test set, which ``test`` introduces, or without one that of the training log.
    """
    routing = report["routing"]
    name = next((name for name in ("test", "valid") if routing.get(name, {}).get("layers")), "train")
    if not routing[name]["layers"]:
        return "No MoE layer: every token goes through one dense feed-forward network."
    rows = {**routing[name]["layers"], "all layers": routing[name]["overall"]}
    names = [figure for figure in ROUTING_FIGURES if any(figure in figures for figures in rows.values())]
    body = [[layer, *(three_digits(figures.get(figure)) for figure in names)] for layer, figures in rows.items()]
    table = tabulate(body, ["layer", *names], tablefmt="github", disable_numparse=True)
    legend = "; ".join(f"{figure}: {ROUTING_FIGURES[figure]}" for figure in names)
    return f"{test if name == 'test' else _ROUTED[name]}\n\n{table}\n\n{legend}."


def price_table(report: dict[str, Any]) -> str:
    """A Markdown table of the model as trained and at other prices of inference; empty if there are none."""
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
            three_digits(figures["flops"]),
            three_digits(figures["loss_bits"]),
        ]
        rows.append([*row, *(f"{scores[metric]['score']:.2f}" for metric in ("bleu", "chrf++"))])
    headers = ["", "threshold", "most experts", "MoE FLOPs / dense", "validation loss (bits)", "BLEU", "chrF2++"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"## Price of inference\n\n{table}\n\nThe models are in calibrated/, for every command without flags.\n"


def three_digits(value: float | None) -> str:
    """Three decimals; nothing for None."""
    return "" if value is None else f"{value:.3f}"
