"""The parts of a page's figures: traces for plotly, and a table of the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.run.record import Run

# Okabe and Ito's colours differ for every kind of colour vision; dashes and markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "pentagon")
_TABLE_ROWS = 14
MOST_LAYERED = 2  # a chart of more runs shows the mean of their layers


@dataclass
class Figure:
    """One chart with a table of the same numbers.

    Attributes:
        caption: what the chart shows, in a sentence or two of plain text.
        headers, rows: the table under the chart.
    """

    key: str
    title: str
    caption: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    headers: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def figure_of(key: str, title: str, caption: str, traces: list[dict[str, Any]], x: str, y: str) -> Figure:
    layout = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, "showlegend": len(traces) > 1}
    if traces and traces[0]["type"] == "bar":
        layout["xaxis"]["type"] = "category"
    headers, rows = table_of(traces, x)
    return Figure(key, title, caption, traces, layout, headers, rows)


def choosable(key: str, title: str, caption: str, choices: dict[str, dict[str, Any]], x: str, y: str) -> Figure:
    """A heatmap with a menu; the first choice is shown and the page offers the others."""
    figure = figure_of(key, title, caption, list(choices.values())[:1], x, y)
    figure.layout |= {
        "xaxis": {"title": {"text": x}, "type": "category"},
        "yaxis": {"title": {"text": y}, "type": "category"},
    }
    figure.layout["meta"] = {"choices": list(choices), "traces": list(choices.values())}
    return figure


def name_among(runs: Sequence[Run], run: Run, text: str) -> str:
    return text if len(runs) == 1 else f"{run.name}, {text}"


def line(
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


def bar(name: str, x: list[Any], y: list[Any], number: int) -> dict[str, Any]:
    pattern = {"shape": ("", "/", "x", ".", "\\", "-", "+", "|")[number % 8], "fillmode": "overlay"}
    marker = {"color": COLOURS[number % len(COLOURS)], "pattern": pattern}
    return {"type": "bar", "name": name, "x": x, "y": y, "marker": marker}


def heatmap(
    x: list[str], y: list[str], z: list[Any], scale: str, zmin: float, zmax: float, unit: str
) -> dict[str, Any]:
    # the page replaces the scale's name by colours that suit its theme
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 12}
    return {"type": "heatmap", "x": x, "y": y, "z": z, "colorscale": scale, "zmin": zmin, "zmax": zmax, "colorbar": bar,
            "hoverongaps": False, "xgap": 1, "ygap": 1,
            "hovertemplate": "%{y}, %{x}: %{z:.3f}<extra></extra>"}  # fmt: skip


def table_of(traces: list[dict[str, Any]], x: str) -> tuple[list[str], list[list[str]]]:
    """The numbers of a chart as text, with long curves thinned and without heatmaps wider than 16 columns."""
    if not traces:
        return [], []
    if traces[0]["type"] == "heatmap":
        trace = traces[0]
        if len(trace["x"]) > 16:
            return [], []
        rows = [[str(name), *map(number_text, row)] for name, row in zip(trace["y"], trace["z"], strict=True)]
        return ["", *map(str, trace["x"])], rows
    keys = list(dict.fromkeys(key for trace in traces for key in trace["x"]))
    if all(isinstance(key, (int, float)) for key in keys):
        keys.sort()
    if len(keys) > _TABLE_ROWS:
        step = (len(keys) - 1) / (_TABLE_ROWS - 1)
        keys = [keys[round(i * step)] for i in range(_TABLE_ROWS)]
    columns = [dict(zip(trace["x"], trace["y"], strict=True)) for trace in traces]
    rows = [
        [number_text(key) if isinstance(key, float) else str(key), *(number_text(c.get(key)) for c in columns)]
        for key in keys
    ]
    return [x, *(trace["name"] for trace in traces)], rows


def number_text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
