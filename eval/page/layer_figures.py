"""Figures of one run's routing, layer by layer."""

from __future__ import annotations

import math
from typing import Any

from eval.page.chart import Figure, choosable, figure_of, heatmap, line, number_text
from eval.run.record import Run


def load_heatmap(run: Run) -> Figure:
    layers = run.layers
    width = max(layer["num_experts"] for layer in layers.values())
    z, text = [], []
    for layer in layers.values():
        even = max(sum(layer["rows"]) / layer["num_experts"], 1e-9)
        share = [rows / even for rows in layer["rows"]]
        z.append([max(-3.0, math.log2(value)) if value else -3.0 for value in share] + [None] * (width - len(share)))
        text.append([_load_text(value, e) for e, value in enumerate(share)] + [""] * (width - len(share)))
    trace = heatmap(
        [str(e) for e in range(width)],
        list(layers),
        z,
        scale="load",
        zmin=-3,
        zmax=3,
        unit="log2 of the share",
    )
    # dead experts get a cross too, since not every reader can tell the colours apart
    marks = [["✕" if hover.endswith("dead") else "" for hover in row] for row in text]
    trace |= {
        "text": marks,
        "customdata": text,
        "hovertemplate": "%{y}, %{customdata}<extra></extra>",
        "texttemplate": "%{text}",
    }
    figure = figure_of(
        "load", "Load of each expert, relative to an even share",
        "0 is an even share, 1 twice as much, -1 half of it; ✕ marks dead experts, which no token reached.",
        [trace], "expert", "",
    )  # fmt: skip
    figure.layout["xaxis"]["type"] = figure.layout["yaxis"]["type"] = "category"
    figure.headers, figure.rows = _load_table(layers)
    return figure


def _load_table(layers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    shown = {
        "used": "used per token",
        "load_cv_total": "load variation",
        "entropy": "entropy (nats)",
        "unserved": "unserved",
    }
    headers = ["layer", "experts", *shown.values(), "dead", "nearly idle"]
    rows = [
        [label, str(layer["num_experts"]), *(number_text(layer[name]) for name in shown),
         _list_of(layer["dead_experts"]), _list_of(layer["nearly_idle_experts"])]
        for label, layer in layers.items()
    ]  # fmt: skip
    return headers, rows


def experts_histogram(run: Run) -> Figure:
    traces = []
    for place, (label, layer) in enumerate(run.layers.items()):
        counts = layer["tokens_by_experts_used"]
        shares = [count / max(sum(counts), 1) for count in counts]
        traces.append(line(label, list(range(len(counts))), shares, place))
    return figure_of(
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
    for place, (label, layer) in enumerate(run.layers.items()):
        found = layer["groups"][group]
        pairs = [(n, v) for n, v in zip(found["names"], found["experts_per_token"], strict=True) if v is not None]
        if pairs:
            names, values = (list(column) for column in zip(*pairs, strict=True))
            traces.append(line(label, names, values, place))
    figure = figure_of(f"by-{group}", f"{title}: experts per token", caption, traces, axis, "experts per token")
    names = next(iter(run.layers.values()))["groups"][group]["names"]
    figure.layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": names}
    return figure


def specialisation(run: Run) -> Figure:
    """A heatmap of an expert's share of a kind's rows over its share of all rows: which expert serves which kind."""
    choices = {}
    for label, layer in run.layers.items():
        found = layer["groups"]["kind"]
        total = max(sum(layer["rows"]), 1)
        z = []
        for rows in found["rows"]:
            here = max(sum(rows), 1)
            z.append([
                max(-3.0, min(3.0, math.log2((count / here) / (all_rows / total)))) if count and all_rows else None
                for count, all_rows in zip(rows, layer["rows"], strict=True)
            ])  # fmt: skip
        choices[label] = heatmap(
            [str(e) for e in range(layer["num_experts"])],
            found["names"],
            z,
            "load",
            -3,
            3,
            "log2 of the ratio",
        )
    return choosable("specialisation", "What the experts specialise in",
                      "How much more often (above 0) or less often (below 0) an expert serves a kind of subword "
                      "than its load would make one expect; 1 is twice as often. Empty: never.",
                      choices, "expert", "")  # fmt: skip


def similarity(run: Run) -> Figure:
    names = {"outputs": "outputs", "router_rows": "router rows", "co_selection": "taken together"}
    choices = {}
    for label, layer in run.layers.items():
        matrices = layer["similarity"] | {"co_selection": layer["co_selection"]}
        for key, name in names.items():
            if matrices.get(key):
                experts = [str(e) for e in range(len(matrices[key]))]
                choices[f"{label}: {name}"] = heatmap(experts, experts, matrices[key], "load", -1, 1, "")
    return choosable("similarity", "Similarity of the experts",
                      "Cosine of two experts' outputs on the same tokens, cosine of their rows in the router, and how "
                      "often the same token takes both (taken together / taken at all).",
                      choices, "expert", "expert")  # fmt: skip


def agreement(run: Run) -> Figure:
    choices = {}
    names = {"first_choice": "first choices", "experts_used": "number of experts"}
    for side, found in run.analysed("agreement").items():
        for key, name in names.items():
            choices[f"{side}: {name}"] = heatmap(found["layers"], found["layers"], found[key], "load", -1, 1, "")
    return choosable("agreement", "Do the layers route alike?",
                      "First choices: normalised mutual information of the likeliest experts (0 independent, "
                      "1 the same up to names). Number of experts: correlation over tokens.",
                      choices, "layer", "layer")  # fmt: skip


def _list_of(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "") if numbers else "none"


def _load_text(share: float, expert: int) -> str:
    return f"expert {expert}: " + (f"{share:.2f} of an even share" if share else "dead")
