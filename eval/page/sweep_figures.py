"""Figures of quality against compute over capacity and threshold, and of wall time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.page.chart import DASHES, MOST_LAYERED, Figure, figure_of, line, name_among
from eval.run.record import Run


def capacity_sweep(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 4."""
    traces = _sweep_traces(runs, "capacity", lambda p: p["flops"], lambda p: p["loss_bits"], _capacity_text)
    return figure_of(
        "capacity", "Quality against compute as the eval capacity falls (Fig 4 of the paper)",
        "Loss on the test set against the FLOPs of the MoE layers, counted from the plans and relative to the dense "
        "feed-forward networks they stand for. Hover for the capacity factor.",
        traces, "MoE FLOPs / dense FLOPs", "bits per token",
    )  # fmt: skip


def capacity_scores(runs: Sequence[Run]) -> Figure:
    traces = _score_traces(runs, "capacity", lambda p: p["translation"]["flops"], _capacity_text)
    return figure_of(
        "capacity-scores", "Translation scores against compute as the eval capacity falls",
        "A sample of the test set translated with beam search at each capacity; FLOPs counted during the search. "
        "Read differences against the confidence interval of so few sentences.",
        traces, "MoE FLOPs / dense FLOPs", "score",
    )  # fmt: skip


def dropped_by_capacity(runs: Sequence[Run]) -> Figure:
    traces = []
    for number, run in enumerate(runs):
        points = [p for p in run.sweep("capacity") if p["eval_capacity_factor"] is not None]
        x = [point["eval_capacity_factor"] for point in points]
        if points and len(runs) > MOST_LAYERED:
            traces.append(line(run.name, x, [point["dropped"] for point in points], number))
            continue
        for place, label in enumerate(points[0]["layers"] if points else []):
            y = [point["layers"][label]["dropped"] for point in points]
            dash = DASHES[place % len(DASHES)] if len(runs) > 1 else "solid"
            traces.append(line(name_among(runs, run, label), x, y, number if len(runs) > 1 else place, dash=dash))
    return figure_of(
        "dropped", "Token-expert pairs dropped at each capacity",
        "Share of the pairs that tokens asked for and the experts had no room for.",
        traces, "eval capacity factor", "share dropped",
    )  # fmt: skip


def threshold_sweep(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 7, at inference."""
    traces = _sweep_traces(
        runs,
        "threshold",
        lambda p: p["threshold"],
        lambda p: p["loss_bits"],
        lambda p: f"FLOPs {p['flops']:.2f}",
    )
    return figure_of(
        "threshold", "Quality against the threshold t at inference (Fig 7 of the paper)",
        "The same checkpoint with other thresholds; hover for the counted FLOPs. Where the curve is flat, t can be "
        "lowered for free.",
        traces, "threshold t", "bits per token",
    )  # fmt: skip


def threshold_scores(runs: Sequence[Run]) -> Figure:
    traces = _score_traces(runs, "threshold", lambda p: p["threshold"], lambda p: f"FLOPs {p['flops']:.2f}")
    return figure_of(
        "threshold-scores", "Translation scores against the threshold t at inference",
        "A sample of the test set translated with beam search at each threshold.",
        traces, "threshold t", "score",
    )  # fmt: skip


def threshold_trained(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 7, over checkpoints trained with different thresholds."""
    points = []
    for run in runs:
        own = run.analysed("checkpoint").get("threshold")
        if isinstance(own, float):  # a list: one for each layer
            points.append((own, run.analysed("quality")["loss_bits"], run.name))
        for point in run.listed("checkpoints"):
            if isinstance(point["threshold"], float):
                points.append((point["threshold"], point["loss_bits"], point["path"].rsplit("/", 1)[-1]))
    points = sorted(points, key=lambda point: point[0])
    traces = []
    if len({threshold for threshold, _, _ in points}) > 1:
        x, y, text = (list(column) for column in zip(*points, strict=True))
        traces = [line("trained with t", x, y, 0, mode="lines+markers", text=text)]
    return figure_of(
        "threshold-trained", "Quality against the threshold a model was trained with (Fig 7 of the paper)",
        "Each point is a checkpoint, run with its own threshold.", traces, "threshold t in training", "bits per token",
    )  # fmt: skip


def speed_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """The paper's Fig 8. ``rows`` are those of a benchmark, with ``flops`` (relative to dense), ``ms`` and the case."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts = [str(row[name]) for name in ("method", "mode", "tokens") if name in row]
        named.setdefault(", ".join(parts) or "layer", []).append(row)
    traces = []
    for number, (name, found) in enumerate(named.items()):
        found = sorted(found, key=lambda row: row["flops"])
        x, y = [row["flops"] for row in found], [row["ms"] for row in found]
        text = [str(row.get("case", "")) for row in found]
        traces.append(line(name, x, y, number, mode="lines+markers", text=text))
    caption = "Median times measured by benchmarks/. Equal FLOPs do not mean equal time: moving rows costs some too."
    return figure_of(
        "speed",
        "Wall time per batch against FLOPs (Fig 8 of the paper)",
        caption,
        traces,
        "FLOPs / dense FLOPs",
        "ms per batch",
    )


def _sweep_traces(runs: Sequence[Run], sweep: str, x: Any, y: Any, text: Any) -> list[dict[str, Any]]:
    traces = []
    for number, run in enumerate(runs):
        points = run.sweep(sweep)
        if points:
            labels = [text(point) for point in points]
            trace = line(run.name, [x(p) for p in points], [y(p) for p in points], number, text=labels)
            traces.append(trace)
    return traces


def _score_traces(runs: Sequence[Run], sweep: str, x: Any, text: Any) -> list[dict[str, Any]]:
    traces = []
    for number, run in enumerate(runs):
        points = [point for point in run.sweep(sweep) if point.get("translation")]
        for metric, dash in (("bleu", "solid"), ("chrf++", "dash")):
            if points:
                y = [point["translation"].get(metric) for point in points]
                labels = [text(point) for point in points]
                name = name_among(runs, run, {"bleu": "BLEU", "chrf++": "chrF2++"}[metric])
                traces.append(line(name, [x(p) for p in points], y, number, dash=dash, text=labels))
    return traces


def _capacity_text(point: dict[str, Any]) -> str:
    factor = point["eval_capacity_factor"]
    return "no limit" if factor is None else f"capacity {factor:g}"
