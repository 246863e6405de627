"""The figures of a report, as plotly traces; each is drawn from analysis JSONs alone (see eval.analyse).

A run is a dictionary: ``name``, ``analysis`` (the JSON, or None) and ``scores`` (scores.json, or None).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Okabe and Ito's colours, told apart with any kind of colour vision; dashes and markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "pentagon")
_TABLE_ROWS = 14
_MOST_LAYERED = 2  # more runs than that in one chart show the mean of their layers
Run = dict[str, Any]


@dataclass
class Figure:
    """One chart with the table that says the same.

    Attributes:
        caption: what one sees, in a sentence or two; plain text.
        headers, rows: the table under the chart.
    """

    key: str
    title: str
    caption: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    headers: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """Figures in which all runs share the axes; those without data are left out."""
    makers = (learning_curves, experts_over_training, experts_per_layer, load_variation, capacity_sweep,
              capacity_scores, dropped_by_capacity, threshold_sweep, threshold_scores, threshold_trained,
              positive_share)  # fmt: skip
    return [figure for figure in (make(runs) for make in makers) if figure.traces]


def run_figures(run: Run) -> list[Figure]:
    """Figures of one run, layer by layer; none for a model without MoE layers."""
    if not layers_of(run):
        return []
    makers = (
        load_heatmap,
        experts_histogram,
        by_kind,
        by_frequency,
        by_position,
        specialisation,
        similarity,
        agreement,
    )
    return [figure for figure in (make(run) for make in makers) if figure.traces]


def layers_of(run: Run) -> dict[str, Any]:
    """Label -> the layer's part of the analysis."""
    return (run["analysis"] or {}).get("layers") or {}


def learning_curves(runs: Sequence[Run]) -> Figure:
    traces = []
    for number, run in enumerate(runs):
        history = (run["analysis"] or {}).get("history") or {}
        for kind, dash in (("train", "dot"), ("valid", "solid")):
            curve = history.get(kind) or {}
            values = curve.get("nll_loss") or curve.get("loss")
            if values:
                traces.append(_line(_name(runs, run, kind), curve["updates"], values, number, dash=dash))
    return _figure(
        "learning", "Learning curves",
        "Cross entropy in bits per token, without label smoothing where the log has it. Dotted: training; solid: "
        "validation.",
        traces, "update", "bits per token",
    )  # fmt: skip


def experts_over_training(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 5."""
    traces = []
    for number, run in enumerate(runs):
        analysis = run["analysis"] or {}
        curves = (analysis.get("history") or {}).get("layers") or {}
        if curves and len(runs) > _MOST_LAYERED:
            train = analysis["history"]["train"]
            traces.append(_line(run["name"], train["updates"], train["moe_wanted"], number))
            continue
        for place, (label, curve) in enumerate(curves.items()):
            colour = number if len(runs) > 1 else place
            dash = DASHES[place % len(DASHES)] if len(runs) > 1 else "solid"
            if curve.get("wanted"):
                traces.append(_line(_name(runs, run, label), curve["updates"], curve["wanted"], colour, dash=dash))
        points = [point for point in analysis.get("checkpoints") or [] if point["num_updates"] and point["layers"]]
        for place, label in enumerate(points[0]["layers"] if len(points) > 1 else []):
            found = sorted((point["num_updates"], point["layers"][label]["wanted"]) for point in points)
            colour = number if len(runs) > 1 else place
            x, y = (list(column) for column in zip(*found, strict=True))
            traces.append(_line(_name(runs, run, f"{label}, checkpoints"), x, y, colour, mode="markers"))
    return _figure(
        "experts-over-training", "Experts a token asks for, while training goes on (Fig 5 of the paper)",
        "Experts that a token needs to reach the threshold, before capacity. It falls as the router grows "
        "sure; it stays flat for routers that always take k.",
        traces, "update", "experts wanted per token",
    )  # fmt: skip


def experts_per_layer(runs: Sequence[Run]) -> Figure:
    return _per_layer(
        runs, "experts-per-layer", "Experts a token used on the test set", "used", "experts per token",
        "Experts that really computed a token, on average. Nothing is dropped at inference unless an eval capacity "
        "was set.",
    )  # fmt: skip


def load_variation(runs: Sequence[Run]) -> Figure:
    return _per_layer(
        runs, "load-variation", "How uneven the load of the experts is", "load_cv_total", "standard deviation / mean",
        "Variation of the rows per expert over the whole test set; 0 is perfectly even. High values mean that a few "
        "experts do the work: raise the balance loss.",
    )  # fmt: skip


def _per_layer(runs: Sequence[Run], key: str, title: str, figure: str, unit: str, caption: str) -> Figure:
    traces = []
    for number, run in enumerate(runs):
        layers = layers_of(run)
        if layers:
            values = [layer[figure] for layer in layers.values()]
            traces.append(_bar(run["name"], list(layers), values, number))
    return _figure(key, title, caption, traces, "layer", unit)


def positive_share(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 1 and 6."""
    traces = []
    for number, run in enumerate(runs):
        analysis = run["analysis"] or {}
        shares = {f"{name} (dense)": share for name, share in (analysis.get("dense_layers") or {}).items()}
        shares |= {name: layer["positive_share"] for name, layer in layers_of(run).items()}
        shares = {name: share["share"] for name, share in shares.items() if share}
        if shares:
            order = sorted(shares, key=lambda name: (not name.startswith("encoder"), int(name.split()[1])))
            traces.append(_bar(run["name"], order, [shares[name] for name in order], number))
    return _figure(
        "positive-share", "Hidden units that are positive (Fig 1 and 6 of the paper)",
        "Share of hidden units with a positive activation, inside dense feed-forward networks and inside the experts a "
        "token took, over a sample of rows. Small experts waste fewer units.",
        traces, "layer", "share of hidden units",
    )  # fmt: skip


def capacity_sweep(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 4."""
    traces = _sweep_traces(runs, "capacity", lambda p: p["flops"], lambda p: p["loss_bits"], _capacity_text)
    return _figure(
        "capacity", "Quality against compute as the eval capacity falls (Fig 4 of the paper)",
        "Loss on the test set against the FLOPs of the MoE layers, counted from the plans and relative to the dense "
        "feed-forward networks they stand for. Hover for the capacity factor.",
        traces, "MoE FLOPs / dense FLOPs", "bits per token",
    )  # fmt: skip


def capacity_scores(runs: Sequence[Run]) -> Figure:
    traces = _score_traces(runs, "capacity", lambda p: p["translation"]["flops"], _capacity_text)
    return _figure(
        "capacity-scores", "Translation scores against compute as the eval capacity falls",
        "A sample of the test set translated with beam search at each capacity; FLOPs counted during the search. "
        "Read differences against the confidence interval of so few sentences.",
        traces, "MoE FLOPs / dense FLOPs", "score",
    )  # fmt: skip


def dropped_by_capacity(runs: Sequence[Run]) -> Figure:
    traces = []
    for number, run in enumerate(runs):
        points = [p for p in _sweep(run, "capacity") if p["eval_capacity_factor"] is not None]
        x = [point["eval_capacity_factor"] for point in points]
        if points and len(runs) > _MOST_LAYERED:
            traces.append(_line(run["name"], x, [point["dropped"] for point in points], number))
            continue
        for place, label in enumerate(points[0]["layers"] if points else []):
            y = [point["layers"][label]["dropped"] for point in points]
            dash = DASHES[place % len(DASHES)] if len(runs) > 1 else "solid"
            traces.append(_line(_name(runs, run, label), x, y, number if len(runs) > 1 else place, dash=dash))
    return _figure(
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
    return _figure(
        "threshold", "Quality against the threshold t at inference (Fig 7 of the paper)",
        "The same checkpoint with other thresholds; hover for the counted FLOPs. Where the curve is flat, t can be "
        "lowered for free.",
        traces, "threshold t", "bits per token",
    )  # fmt: skip


def threshold_scores(runs: Sequence[Run]) -> Figure:
    traces = _score_traces(runs, "threshold", lambda p: p["threshold"], lambda p: f"FLOPs {p['flops']:.2f}")
    return _figure(
        "threshold-scores", "Translation scores against the threshold t at inference",
        "A sample of the test set translated with beam search at each threshold.",
        traces, "threshold t", "score",
    )  # fmt: skip


def threshold_trained(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 7, over checkpoints trained with different t."""
    points = []
    for run in runs:
        analysis = run["analysis"] or {}
        if isinstance((analysis.get("checkpoint") or {}).get("threshold"), float):  # a list: one for each layer
            points.append((analysis["checkpoint"]["threshold"], analysis["quality"]["loss_bits"], run["name"]))
        for point in analysis.get("checkpoints") or []:
            if isinstance(point["threshold"], float):
                points.append((point["threshold"], point["loss_bits"], point["path"].rsplit("/", 1)[-1]))
    points = sorted(points, key=lambda point: point[0])
    traces = []
    if len({threshold for threshold, _, _ in points}) > 1:
        x, y, text = (list(column) for column in zip(*points, strict=True))
        traces = [_line("trained with t", x, y, 0, mode="lines+markers", text=text)]
    return _figure(
        "threshold-trained", "Quality against the threshold a model was trained with (Fig 7 of the paper)",
        "Each point is a checkpoint, run with its own threshold.", traces, "threshold t in training", "bits per token",
    )  # fmt: skip


def speed_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """The paper's Fig 8. ``rows``: of a benchmark, with ``flops`` (relative to dense), ``ms`` and what was timed."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts = [str(row[name]) for name in ("method", "mode", "tokens") if name in row]
        named.setdefault(", ".join(parts) or "layer", []).append(row)
    traces = []
    for number, (name, found) in enumerate(named.items()):
        found = sorted(found, key=lambda row: row["flops"])
        x, y = [row["flops"] for row in found], [row["ms"] for row in found]
        text = [str(row.get("case", "")) for row in found]
        traces.append(_line(name, x, y, number, mode="lines+markers", text=text))
    caption = "Median times measured by benchmarks/. Equal FLOPs do not mean equal time: moving rows costs some too."
    return _figure(
        "speed",
        "Wall time per batch against FLOPs (Fig 8 of the paper)",
        caption,
        traces,
        "FLOPs / dense FLOPs",
        "ms per batch",
    )


def load_heatmap(run: Run) -> Figure:
    layers = layers_of(run)
    width = max(layer["num_experts"] for layer in layers.values())
    z, text = [], []
    for layer in layers.values():
        even = max(sum(layer["rows"]) / layer["num_experts"], 1e-9)
        share = [rows / even for rows in layer["rows"]]
        z.append([max(-3.0, math.log2(value)) if value else -3.0 for value in share] + [None] * (width - len(share)))
        text.append([_load_text(value, e) for e, value in enumerate(share)] + [""] * (width - len(share)))
    trace = _heatmap(
        [str(e) for e in range(width)],
        list(layers),
        z,
        scale="load",
        zmin=-3,
        zmax=3,
        unit="log2 of the share",
    )
    # a cross for the dead: colour is never the only sign
    marks = [["✕" if hover.endswith("dead") else "" for hover in row] for row in text]
    trace |= {
        "text": marks,
        "customdata": text,
        "hovertemplate": "%{y}, %{customdata}<extra></extra>",
        "texttemplate": "%{text}",
    }
    figure = _figure(
        "load", "Load of each expert, relative to an even share",
        "0 is an even share, 1 twice as much, -1 half of it; ✕ marks dead experts, which no token reached.",
        [trace], "expert", "",
    )  # fmt: skip
    figure.layout["xaxis"]["type"] = figure.layout["yaxis"]["type"] = "category"
    shown = {
        "used": "used per token",
        "load_cv_total": "load variation",
        "entropy": "entropy (nats)",
        "unserved": "unserved",
    }
    figure.headers = ["layer", "experts", *shown.values(), "dead", "nearly idle"]
    figure.rows = [
        [label, str(layer["num_experts"]), *(_number(layer[name]) for name in shown),
         _list_of(layer["dead_experts"]), _list_of(layer["nearly_idle_experts"])]
        for label, layer in layers.items()
    ]  # fmt: skip
    return figure


def experts_histogram(run: Run) -> Figure:
    traces = []
    for place, (label, layer) in enumerate(layers_of(run).items()):
        counts = layer["tokens_by_experts_used"]
        shares = [count / max(sum(counts), 1) for count in counts]
        traces.append(_line(label, list(range(len(counts))), shares, place))
    return _figure(
        "histogram", "How many experts tokens take", "Share of the tokens that took so many experts, per layer.",
        traces, "experts of a token", "share of tokens",
    )  # fmt: skip


def by_kind(run: Run) -> Figure:
    return _by_group(
        run,
        "kind",
        "By kind of subword",
        "kind of subword",
        "Experts a token took, by what its subword is. Start and end of a sentence are special.",
    )


def by_frequency(run: Run) -> Figure:
    return _by_group(run, "frequency", "By frequency of the token", "occurrences in the test set",
                     "Experts a token took, by how often it occurs in the analysed test set.")  # fmt: skip


def by_position(run: Run) -> Figure:
    return _by_group(run, "position", "By part of the sentence", "part of the sentence",
                     "Experts a token took, by the tenth of the sentence it stands in.")  # fmt: skip


def _by_group(run: Run, group: str, title: str, axis: str, caption: str) -> Figure:
    traces = []
    for place, (label, layer) in enumerate(layers_of(run).items()):
        found = layer["groups"][group]
        pairs = [(n, v) for n, v in zip(found["names"], found["experts_per_token"], strict=True) if v is not None]
        if pairs:
            names, values = (list(column) for column in zip(*pairs, strict=True))
            traces.append(_line(label, names, values, place))
    figure = _figure(f"by-{group}", f"{title}: experts per token", caption, traces, axis, "experts per token")
    names = next(iter(layers_of(run).values()))["groups"][group]["names"]
    figure.layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": names}
    return figure


def specialisation(run: Run) -> Figure:
    """Which experts serve which kind of subword: share of the kind's rows over the expert's share of all rows."""
    choices = {}
    for label, layer in layers_of(run).items():
        found = layer["groups"]["kind"]
        total = max(sum(layer["rows"]), 1)
        z = []
        for rows in found["rows"]:
            here = max(sum(rows), 1)
            z.append([
                max(-3.0, min(3.0, math.log2((count / here) / (all_rows / total)))) if count and all_rows else None
                for count, all_rows in zip(rows, layer["rows"], strict=True)
            ])  # fmt: skip
        choices[label] = _heatmap(
            [str(e) for e in range(layer["num_experts"])],
            found["names"],
            z,
            "load",
            -3,
            3,
            "log2 of the ratio",
        )
    return _choosable("specialisation", "What the experts specialise in",
                      "How much more often (above 0) or less often (below 0) an expert serves a kind of subword "
                      "than its load would make one expect; 1 is twice as often. Empty: never.",
                      choices, "expert", "")  # fmt: skip


def similarity(run: Run) -> Figure:
    names = {"outputs": "outputs", "router_rows": "router rows", "co_selection": "taken together"}
    choices = {}
    for label, layer in layers_of(run).items():
        matrices = layer["similarity"] | {"co_selection": layer["co_selection"]}
        for key, name in names.items():
            if matrices.get(key):
                experts = [str(e) for e in range(len(matrices[key]))]
                choices[f"{label}: {name}"] = _heatmap(experts, experts, matrices[key], "load", -1, 1, "")
    return _choosable("similarity", "Similarity of the experts",
                      "Cosine of two experts' outputs on the same tokens, cosine of their rows in the router, and how "
                      "often the same token takes both (taken together / taken at all).",
                      choices, "expert", "expert")  # fmt: skip


def agreement(run: Run) -> Figure:
    choices = {}
    names = {"first_choice": "first choices", "experts_used": "number of experts"}
    for side, found in ((run["analysis"] or {}).get("agreement") or {}).items():
        for key, name in names.items():
            choices[f"{side}: {name}"] = _heatmap(found["layers"], found["layers"], found[key], "load", -1, 1, "")
    return _choosable("agreement", "Do the layers route alike?",
                      "First choices: normalised mutual information of the likeliest experts (0 independent, "
                      "1 the same up to names). Number of experts: correlation over tokens.",
                      choices, "layer", "layer")  # fmt: skip


def _sweep(run: Run, name: str) -> list[dict[str, Any]]:
    return ((run["analysis"] or {}).get("sweeps") or {}).get(name) or []


def _sweep_traces(runs: Sequence[Run], sweep: str, x: Any, y: Any, text: Any) -> list[dict[str, Any]]:
    traces = []
    for number, run in enumerate(runs):
        points = _sweep(run, sweep)
        if points:
            labels = [text(point) for point in points]
            trace = _line(run["name"], [x(p) for p in points], [y(p) for p in points], number, text=labels)
            traces.append(trace)
    return traces


def _score_traces(runs: Sequence[Run], sweep: str, x: Any, text: Any) -> list[dict[str, Any]]:
    traces = []
    for number, run in enumerate(runs):
        points = [point for point in _sweep(run, sweep) if point.get("translation")]
        for metric, dash in (("bleu", "solid"), ("chrf++", "dash")):
            if points:
                y = [point["translation"].get(metric) for point in points]
                labels = [text(point) for point in points]
                name = _name(runs, run, {"bleu": "BLEU", "chrf++": "chrF2++"}[metric])
                traces.append(_line(name, [x(p) for p in points], y, number, dash=dash, text=labels))
    return traces


def _capacity_text(point: dict[str, Any]) -> str:
    factor = point["eval_capacity_factor"]
    return "no limit" if factor is None else f"capacity {factor:g}"


def _name(runs: Sequence[Run], run: Run, text: str) -> str:
    return text if len(runs) == 1 else f"{run['name']}, {text}"


def _line(
    name: str, x: list[Any], y: list[Any], number: int, *, dash: str = "solid", mode: str = "", text: Any = None
) -> dict[str, Any]:
    colour, symbol = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    trace = {
        "type": "scatter",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "dash": dash, "width": 2},
    }
    trace |= {
        "mode": mode or ("lines" if len(x) > 30 else "lines+markers"),
        "marker": {"symbol": symbol, "color": colour, "size": 8},
    }
    if text is not None:
        trace |= {
            "text": text,
            "hovertemplate": "%{x:.4g}, %{y:.4g}<br>%{text}<extra>%{fullData.name}</extra>",
        }
    return trace


def _bar(name: str, x: list[Any], y: list[Any], number: int) -> dict[str, Any]:
    pattern = {"shape": ("", "/", "x", ".", "\\", "-", "+", "|")[number % 8], "fillmode": "overlay"}
    marker = {"color": COLOURS[number % len(COLOURS)], "pattern": pattern}
    return {"type": "bar", "name": name, "x": x, "y": y, "marker": marker}


def _heatmap(
    x: list[str], y: list[str], z: list[Any], scale: str, zmin: float, zmax: float, unit: str
) -> dict[str, Any]:
    # the page replaces the name of the scale by colours that suit its theme
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 12}
    return {"type": "heatmap", "x": x, "y": y, "z": z, "colorscale": scale, "zmin": zmin, "zmax": zmax, "colorbar": bar,
            "hoverongaps": False, "xgap": 1, "ygap": 1,
            "hovertemplate": "%{y}, %{x}: %{z:.3f}<extra></extra>"}  # fmt: skip


def _figure(key: str, title: str, caption: str, traces: list[dict[str, Any]], x: str, y: str) -> Figure:
    layout = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, "showlegend": len(traces) > 1}
    if traces and traces[0]["type"] == "bar":
        layout["xaxis"]["type"] = "category"
    headers, rows = table_of(traces, x)
    return Figure(key, title, caption, traces, layout, headers, rows)


def _choosable(key: str, title: str, caption: str, choices: dict[str, dict[str, Any]], x: str, y: str) -> Figure:
    """A heatmap with a menu: the first choice is shown, the page offers the others."""
    figure = _figure(key, title, caption, list(choices.values())[:1], x, y)
    figure.layout |= {
        "xaxis": {"title": {"text": x}, "type": "category"},
        "yaxis": {"title": {"text": y}, "type": "category"},
    }
    figure.layout["meta"] = {"choices": list(choices), "traces": list(choices.values())}
    return figure


def table_of(traces: list[dict[str, Any]], x: str) -> tuple[list[str], list[list[str]]]:
    """The numbers of a chart as text; long curves are thinned, heatmaps wider than 16 columns left out."""
    if not traces:
        return [], []
    if traces[0]["type"] == "heatmap":
        trace = traces[0]
        if len(trace["x"]) > 16:
            return [], []
        rows = [[str(name), *map(_number, row)] for name, row in zip(trace["y"], trace["z"], strict=True)]
        return ["", *map(str, trace["x"])], rows
    keys = list(dict.fromkeys(key for trace in traces for key in trace["x"]))
    if all(isinstance(key, (int, float)) for key in keys):
        keys.sort()
    if len(keys) > _TABLE_ROWS:
        step = (len(keys) - 1) / (_TABLE_ROWS - 1)
        keys = [keys[round(i * step)] for i in range(_TABLE_ROWS)]
    columns = [dict(zip(trace["x"], trace["y"], strict=True)) for trace in traces]
    rows = [
        [_number(key) if isinstance(key, float) else str(key), *(_number(c.get(key)) for c in columns)] for key in keys
    ]
    return [x, *(trace["name"] for trace in traces)], rows


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _list_of(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "") if numbers else "none"


def _load_text(share: float, expert: int) -> str:
    return f"expert {expert}: " + (f"{share:.2f} of an even share" if share else "dead")
