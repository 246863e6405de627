"""Render study.html: the tables and figures of a study on one page that needs no network.

The wall time of training is the paper's Fig 8. Below the study's own figures come those of eval.report for the first
seed of every method: Fig 4, 5 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.page.chart import COLOURS, MARKERS, Figure
from eval.page.render import render as render_report
from eval.run.record import Run
from eval.studies import text
from eval.studies.kinds import kind_of


def seed_points(study: dict[str, Any], pair: str, measure: str) -> Figure:
    """Every seed of every method as a point."""
    title, more = kind_of(study).measures[measure]
    traces = []
    for number, method in enumerate(study["pairs"][pair]["methods"].values()):
        values = [cell[measure] for cell in method["seeds"].values()]
        seeds = [f"seed {seed}" for seed in method["seeds"]]
        traces.append(_points(method["title"], [method["title"]] * len(values), values, number, seeds))
    caption = f"One point a seed. {'More' if more else 'Less'} is better."
    return _figure(f"{measure.strip('+')}-{pair}", f"{pair}: {title}", caption, traces, "method", title)


def quality_against_flops(study: dict[str, Any], pair: str, measure: str) -> Figure:
    """Plot all methods in one chart, as trained and at each price."""
    title, more = kind_of(study).measures[measure]
    traces = []
    for number, method in enumerate(study["pairs"][pair]["methods"].values()):
        x, y, names = [], [], []
        for seed, cell in method["seeds"].items():
            x.append(cell["mflops_inference"])
            y.append(cell[measure])
            names.append(f"seed {seed}, as trained")
            for goal, price in cell["prices"].items():
                x.append(price["mflops"])
                y.append(price[measure])
                names.append(f"seed {seed}, {goal}")
        traces.append(_points(method["title"], x, y, number, names))
    caption = (
        f"Counted FLOPs of matrix products for {kind_of(study).token}, attention scores left out. "
        f"{'More' if more else 'Less'} is better; hover for the seed and the price."
    )
    key = f"price-{measure.strip('+')}-{pair}"
    return _figure(key, f"{pair}: {title} against FLOPs", caption, traces, "MFLOPs a token at inference", title)


def wall_time(study: dict[str, Any], speeds: dict[str, Any], pair: str) -> Figure:
    """Plot the time of a training word against the FLOPs of the MoE layers: the paper's Fig 8 for the whole model."""
    traces = []
    for number, (name, method) in enumerate(study["pairs"][pair]["methods"].items()):
        x, y, seeds = [], [], []
        for seed, cell in method["seeds"].items():
            words = speeds[f"{pair}/{name}/seed-{seed}"]["training_words_per_second"]
            if words:
                x.append(cell["moe_flops_training"])
                y.append(1e6 / words)
                seeds.append(f"seed {seed}")
        if x:
            traces.append(_points(method["title"], x, y, number, seeds))
    caption = (
        f"Whole training, {kind_of(study).words}. Cells that ran at the same time shared the machine, so small "
        "differences say nothing; a single layer on a quiet machine is timed by xmoe bench."
    )
    title = f"{pair}: wall time of training against FLOPs (Fig 8 of the paper)"
    return _figure(f"wall-time-{pair}", title, caption, traces, "MoE FLOPs / dense, training", "microseconds a word")


def sweep_figure(study: dict[str, Any], pair: str) -> Figure:
    """Plot test perplexity against MoE FLOPs as the threshold falls, a line for each method and seed (Table 2)."""
    traces = []
    for number, method in enumerate(study["pairs"][pair]["methods"].values()):
        for seed, cell in method["seeds"].items():
            if points := cell.get("sweep"):
                x, y = [point["moe_flops"] for point in points], [point["perplexity"] for point in points]
                name = method["title"] if len(method["seeds"]) == 1 else f"{method['title']}, seed {seed}"
                labels = [f"t = {point['threshold']:g}" for point in points]
                traces.append(_points(name, x, y, number, labels) | {"mode": "lines+markers"})
    caption = "The same checkpoint with other thresholds t; hover for them. FLOPs are counted on the validation set."
    return _figure(
        f"sweep-{pair}", f"{pair}: test perplexity as the threshold falls (Table 2 of the paper)", caption, traces,
        "MoE FLOPs / dense FLOPs", "test perplexity",
    )  # fmt: skip


def _points(name: str, x: list[Any], y: list[float], number: int, labels: list[str]) -> dict[str, Any]:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    style = {"color": colour, "symbol": marker, "size": 9}
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "text": labels, "marker": style}


def _figure(key: str, title: str, caption: str, traces: list[dict[str, Any]], x: str, y: str) -> Figure:
    rows = [
        [trace["name"], label, one if isinstance(one, str) else f"{one:.2f}", f"{other:.3f}"]
        for trace in traces
        for label, one, other in zip(trace["text"], trace["x"], trace["y"], strict=True)
    ]
    layout = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return Figure(key, title, caption, traces, layout, ["method", "point", x, y], rows)


def figures(study: dict[str, Any], speeds: dict[str, Any]) -> list[Figure]:
    """The study's own figures, pair by pair."""
    found = []
    for pair, content in study["pairs"].items():
        if content["methods"]:
            measures = list(kind_of(study).measures)
            found += [seed_points(study, pair, measure) for measure in measures]
            found += [quality_against_flops(study, pair, measure) for measure in measures[:2]]
            found += [figure for figure in (sweep_figure(study, pair),) if figure.traces]
            found.append(wall_time(study, speeds, pair))
    return found


def tables(study: dict[str, Any], speeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Title, note, headers and rows of every table."""
    found = []
    for pair, content in study["pairs"].items():
        if content["methods"]:
            headers, rows = text.pair_table(study, pair, speeds)
            found.append({"title": pair, "note": text.pair_note(study, pair), "headers": headers, "rows": rows})
            headers, rows = text.sweep_table(study, pair)
            note = ". ".join([text.SWEEP.rstrip("."), *text.sweep_lines(study, pair)]) + "."
            found.append({"title": f"{pair}: thresholds", "note": note, "headers": headers, "rows": rows})
    for measure, (title, _) in kind_of(study).measures.items():
        headers, rows = text.tests_table(study, measure)
        note = text.tests_note(study)
        found.append({"title": f"Differences over seeds: {title}", "note": note, "headers": headers, "rows": rows})
    headers, rows = text.within_table(study)
    note = f"Against {study['baseline']}. {text.TEST_WITHIN}"
    found.append({"title": "Differences within seeds", "note": note, "headers": headers, "rows": rows})
    lines = [
        [title, line]
        for measure, (title, _) in kind_of(study).measures.items()
        for line in text.order_lines(study, measure)
    ]
    note = text.order_note(study)
    found.append({"title": "Order of methods", "note": note, "headers": ["measure", "order"], "rows": lines})
    return [table for table in found if table["rows"]]


def render(study: dict[str, Any], speeds: dict[str, Any], runs: Sequence[Run]) -> str:
    """Render the page; ``runs`` are those of eval.report, the first seed of every method."""
    return render_report(
        runs, title=study["title"], study={"tables": tables(study, speeds), "figures": figures(study, speeds)}
    )
