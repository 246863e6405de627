"""Learning curves of a training log, and the routing of every layer against updates (the paper's Fig 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.run.training_log import LAYER_FIGURE, Record, layer_order, read_records

_CURVES = (
    "loss",
    "nll_loss",
    "ppl",
    "wps",
    "lr",
    "moe_wanted",
    "moe_used",
    "moe_dropped",
    "moe_flops",
    "bleu",
)
_LAYER_CURVES = ("wanted", "used", "dropped", "load_cv", "entropy")
MAX_POINTS = 400


def read_history(path: str) -> dict[str, Any]:
    """Curves of a log of fairseq with ``log_format json``, thinned to at most 400 points each.

    Returns:
        ``train`` and ``valid`` hold ``updates`` and one list per figure. ``layers`` holds the same for each label, from
        training. ``first_nan_update`` is the update at which the loss stopped being a number, or None.
    Raises:
        FileNotFoundError; ValueError if the log holds no figures.
    """
    records = [record for record in read_records(path) if record.num_updates is not None]
    inner = [record for record in records if record.kind == "train_inner"]
    train = inner or [record for record in records if record.kind == "train"]
    valid = [record for record in records if record.kind == "valid"]
    if not train and not valid:
        raise ValueError(f"{path}: holds no figures; train with common.log_format=json (flag --log-format json)")
    nan = [r.num_updates for r in train + valid if not math.isfinite(r.figures.get("loss", 0.0))]
    return {
        "train": _curves(_thin(train), _CURVES),
        "valid": _curves(_thin(valid), (*_CURVES, "best_loss")),
        "layers": _layer_curves(_thin(train)),
        "first_nan_update": min(nan, default=None),
    }


def _thin(records: Sequence[Record]) -> list[Record]:
    step = -(-len(records) // MAX_POINTS) or 1
    return list(records[::-1][::step][::-1])  # counted from the end, so that the last point stays


def _curves(records: Sequence[Record], names: Sequence[str]) -> dict[str, list[float | None]]:
    present = [name for name in names if any(name in record.figures for record in records)]
    curves = {name: [record.figures.get(name) for record in records] for name in present}
    return {"updates": [record.num_updates for record in records], **curves}


def _layer_curves(records: Sequence[Record]) -> dict[str, dict[str, list[float | None]]]:
    layers: dict[str, dict[str, list[float | None]]] = {}
    keys = sorted({key for record in records for key in record.figures if LAYER_FIGURE.fullmatch(key)})
    for key in keys:
        side, index, figure = LAYER_FIGURE.fullmatch(key).groups()
        if figure in _LAYER_CURVES:
            curves = layers.setdefault(f"{side} {index}", {"updates": [record.num_updates for record in records]})
            curves[figure] = [record.figures.get(key) for record in records]
    return {label: layers[label] for label in sorted(layers, key=layer_order)}
