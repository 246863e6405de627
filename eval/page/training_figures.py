"""Figures that compare runs: learning curves, and figures of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eval.page.chart import DASHES, MOST_LAYERED, Figure, bar, figure_of, line, name_among
from eval.run.record import Run
from eval.run.training_log import layer_order


def learning_curves(runs: Sequence[Run]) -> Figure:
    traces = []
    for number, run in enumerate(runs):
        history = run.analysed("history")
        for kind, dash in (("train", "dot"), ("valid", "solid")):
            curve = history.get(kind) or {}
            values = curve.get("nll_loss") or curve.get("loss")
            if values:
                traces.append(line(name_among(runs, run, kind), curve["updates"], values, number, dash=dash))
    return figure_of(
        "learning", "Learning curves",
        "Cross entropy in bits per token, without label smoothing where the log has it. Dotted: training; solid: "
        "validation.",
        traces, "update", "bits per token",
    )  # fmt: skip


def experts_over_training(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 5."""
    traces = []
    for number, run in enumerate(runs):
        history = run.analysed("history")
        curves = history.get("layers") or {}
        if curves and len(runs) > MOST_LAYERED:
            train = history["train"]
            traces.append(line(run.name, train["updates"], train["moe_wanted"], number))
            continue
        for place, (label, curve) in enumerate(curves.items()):
            colour = number if len(runs) > 1 else place
            dash = DASHES[place % len(DASHES)] if len(runs) > 1 else "solid"
            if curve.get("wanted"):
                traces.append(line(name_among(runs, run, label), curve["updates"], curve["wanted"], colour, dash=dash))
        points = [point for point in run.listed("checkpoints") if point["num_updates"] and point["layers"]]
        for place, label in enumerate(points[0]["layers"] if len(points) > 1 else []):
            found = sorted((point["num_updates"], point["layers"][label]["wanted"]) for point in points)
            colour = number if len(runs) > 1 else place
            x, y = (list(column) for column in zip(*found, strict=True))
            traces.append(line(name_among(runs, run, f"{label}, checkpoints"), x, y, colour, mode="markers"))
    return figure_of(
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
    traces = _bars(runs, lambda run: {label: layer[figure] for label, layer in run.layers.items()})
    return figure_of(key, title, caption, traces, "layer", unit)


def _bars(runs: Sequence[Run], values_of: Callable[[Run], dict[str, float]]) -> list[dict[str, Any]]:
    """A trace for each run that has values (label -> height), in the order of the labels."""
    named = [(number, run.name, values_of(run)) for number, run in enumerate(runs)]
    return [bar(name, list(values), list(values.values()), number) for number, name, values in named if values]


def positive_share(runs: Sequence[Run]) -> Figure:
    """The paper's Fig 1 and 6."""

    def shares_of(run: Run) -> dict[str, float]:
        shares = {f"{name} (dense)": share for name, share in run.analysed("dense_layers").items()}
        shares |= {name: layer["positive_share"] for name, layer in run.layers.items()}
        return {name: shares[name]["share"] for name in sorted(shares, key=layer_order) if shares[name]}

    traces = _bars(runs, shares_of)
    return figure_of(
        "positive-share", "Hidden units that are positive (Fig 1 and 6 of the paper)",
        "Share of hidden units with a positive activation, inside dense feed-forward networks and inside the experts a "
        "token took, over a sample of rows. Small experts waste fewer units.",
        traces, "layer", "share of hidden units",
    )  # fmt: skip
