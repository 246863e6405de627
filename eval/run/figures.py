"""The figures of one run, read from its training log, generation log, checkpoint and calibration reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.run.flops import flops_per_token
from eval.run.training_log import LAYER_FIGURE, Record, last_figures, layer_order
from eval.text import files
from xmoe_fairseq.checkpoints.structure import count_parameters

_SPEED = re.compile(r"Translated ([\d,]+) sentences \(([\d,]+) tokens\) in ([\d.]+)s")
_PACKAGES = ("torch", "fairseq-fixed", "fairseq", "sacrebleu", "sentencepiece", "subword-nmt")


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
    """Updates, time, losses and routing of the training. Raises: ValueError if the log holds no end of an epoch."""
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
    Raises: FileNotFoundError; ValueError if no file has the summary line, because the translation did not end.
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
    """The same value in JSON's types; an argparse.Namespace becomes a dictionary."""
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def calibrated_figures(paths: Sequence[str]) -> dict[str, Any]:
    """The reports of ``eval.calibrate`` and the scores beside them, by goal such as ``loss:0.01``.

    A report of a model that has nothing to calibrate adds nothing.
    """
    found: dict[str, Any] = {}
    for goal, path, report in calibrations(paths):
        score = files.read_json(path.removesuffix(".json") + ".score.json")
        found[goal] = kept_of_calibration(report) | {"scores": score["scores"], "hypotheses": score["hypotheses"]}
    return found


def calibrations(paths: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Goal such as ``loss:0.01``, path and content of each report of a model that has something to calibrate."""
    for path in paths:
        report = files.read_json(path)
        if report["after"] is not None:
            (kind, value), *_ = report["goal"].items()
            yield f"{kind.removeprefix('max_')}:{value:g}", path, report


def kept_of_calibration(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a calibration's report that scores.json keeps."""
    return {name: report[name] for name in ("before", "after", "budget_met")}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a score."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
