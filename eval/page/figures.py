"""The figures of a report in their order, drawn from analysis JSONs alone (see eval.analyse)."""

from __future__ import annotations

from collections.abc import Sequence

from eval.page import layer_figures, sweep_figures, training_figures
from eval.page.chart import Figure
from eval.run.record import Run

_OF_SEVERAL = (
    training_figures.learning_curves,
    training_figures.experts_over_training,
    training_figures.experts_per_layer,
    training_figures.load_variation,
    sweep_figures.capacity_sweep,
    sweep_figures.capacity_scores,
    sweep_figures.dropped_by_capacity,
    sweep_figures.threshold_sweep,
    sweep_figures.threshold_scores,
    sweep_figures.threshold_trained,
    training_figures.positive_share,
)
_OF_ONE = (
    layer_figures.load_heatmap,
    layer_figures.experts_histogram,
    layer_figures.by_kind,
    layer_figures.by_frequency,
    layer_figures.by_position,
    layer_figures.specialisation,
    layer_figures.similarity,
    layer_figures.agreement,
)


def comparison_figures(runs: Sequence[Run]) -> list[Figure]:
    """Figures in which all runs share the axes; those without data are left out."""
    return [figure for figure in (make(runs) for make in _OF_SEVERAL) if figure.traces]


def run_figures(run: Run) -> list[Figure]:
    """Figures of one run, layer by layer; none for a model without MoE layers."""
    if not run.layers:
        return []
    return [figure for figure in (make(run) for make in _OF_ONE) if figure.traces]
