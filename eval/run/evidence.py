"""The facts that stand beside the scores in a report: training data, cut lines, and the cost of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.text import files

_SOURCE = re.compile(r"S-(\d+)\t(.*)")
_HYPOTHESIS = re.compile(r"H-(\d+)\t[^\t]*\t(.*)")


def count_pairs(data: str | Path, pair: str) -> int:
    """Pairs of the training split of a folder of fairseq-preprocess. Raises: FileNotFoundError if there is none."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    prefix = Path(data, f"train.{pair}.{pair.split('-')[0]}")
    if not MMapIndexedDataset.exists(str(prefix)):
        raise FileNotFoundError(f"no such file: {prefix}.idx; it is written by fairseq-preprocess")
    return len(MMapIndexedDataset(str(prefix)))


def data_figures(
    data: str | Path, pair: str, *, lengths: str | None, overlap: str | None, corpora: str | None, cut: str | None
) -> dict[str, Any]:
    """Facts about the data of a run. None or an absent file adds nothing.

    Args:
        lengths: JSON of ``data_prep.lengths``.
        overlap: JSON of ``data_prep.validate``.
        cut: JSON of ``data_prep.subwords encode`` on the source of the test set.
        corpora: list of ``data_prep/download_wmt23.sh``.
    """
    left_out = []
    if corpora and Path(corpora).is_file():
        rows = [line.split("\t", 1) for line in files.read_lines(corpora)]
        left_out = [": ".join(row) for row in rows if not row[-1].strip().isdigit()]
    return {
        "train_pairs": count_pairs(data, pair),
        "left_out_corpora": left_out,
        "lengths": _json(lengths),
        "held_out_in_training": _json(overlap).get("held_out", []),
        "cut": _json(cut),
    }


def _json(path: str | None) -> dict[str, Any]:
    return files.read_json(path) if path and Path(path).is_file() else {}


def at_length_limit(lines: Iterable[str], *, max_len_a: float, max_len_b: int, positions: int) -> int:
    """Count the hypotheses of fairseq-generate's output that end because they reached the most tokens allowed.

    fairseq allows ``max_len_a`` times the length of the longest source of the batch, end mark included, plus
    ``max_len_b``. If ``max_len_a`` is above 0, a sentence counts that reached the limit of its own source, which may
    count a few too many.
    """
    source_lengths: dict[str, int] = {}
    reached = 0
    for line in lines:
        if found := _SOURCE.match(line):
            source_lengths[found[1]] = len(found[2].split()) + 1
        elif found := _HYPOTHESIS.match(line):
            most = min(int(max_len_a * source_lengths.get(found[1], 0) + max_len_b), positions - 1)
            reached += len(found[2].split()) >= most
    return reached


def inference_figures(analysis: dict[str, Any]) -> dict[str, Any]:
    """Costs of the MoE layers per token of the test set, counted from the routing plans.

    Args:
        analysis: JSON of eval.analyse over the whole set (teacher forcing), with the settings of the translation.
    Returns:
        ``flops_per_token``: encoder -> FLOPs of its MoE layers' experts per source token, decoder -> per target token
        (2 per multiply-add, without gates, biases and activations). ``relative_flops``: relative to the dense FFNs of
        the same layers (1 without MoE layers). ``experts_per_token``: mean over layers. ``set`` and ``checkpoint``.
    """
    layers: dict[str, Any] = analysis["layers"]
    per_side = {"encoder": 0.0, "decoder": 0.0}
    for name, layer in layers.items():
        per_side[name.split()[0]] += layer["flops"] * layer["dense_flops_per_token"]
    tokens = sum(layer["tokens"] for layer in layers.values())

    def mean(figure: str) -> float:
        return sum(layer["tokens"] * layer[figure] for layer in layers.values()) / tokens

    return {
        "set": analysis["data"]["set"],
        "checkpoint": Path(analysis["checkpoint"]["path"]).name,
        "flops_per_token": per_side if layers else None,
        "relative_flops": mean("flops") if layers else 1.0,
        "experts_per_token": mean("used") if layers else None,
    }


def routing_of(analysis: dict[str, Any], figures: Iterable[str]) -> dict[str, Any]:
    """The analysis' routing in the form of ``routing_figures``: overall (means over tokens) and by layer."""
    layers = {
        name: {figure: layer[figure] for figure in figures if figure in layer}
        for name, layer in analysis["layers"].items()
    }
    tokens = {name: layer["tokens"] for name, layer in analysis["layers"].items()}
    overall = {
        figure: sum(tokens[name] * layers[name][figure] for name in layers) / max(sum(tokens.values()), 1)
        for figure in next(iter(layers.values()), {})
    }
    return {"overall": overall, "layers": layers}


def cost_line(report: dict[str, Any]) -> str:
    """One sentence on the cost of the MoE layers at inference; empty without an analysis."""
    inference = report.get("inference")
    if not inference:
        return ""
    if inference["flops_per_token"] is None:
        return "MoE layers at inference: none; the dense FFN counts as 1."
    sides = ", ".join(
        f"{flops / 1e6:,.3g} MFLOPs a {side} token" for side, flops in inference["flops_per_token"].items()
    )
    return (
        f"MoE layers at inference: {inference['relative_flops']:.3f} of the dense FFN's FLOPs, "
        f"{inference['experts_per_token']:.2f} experts a token ({sides})."
    )


def evidence_rows(report: dict[str, Any]) -> dict[str, str]:
    """Rows about the data, cut lines, averaged checkpoints and settings that changed during the training."""
    generation, data = report["generation"], report.get("data")
    facts = {
        "translations at the length limit": f"{generation['at_length_limit']} (max-len-a {generation['max_len_a']:g}, "
        f"max-len-b {generation['max_len_b']})",
        "checkpoints averaged": ", ".join(report["averaged_from"] or ["none"]),
        "changed while training": "; ".join(report["training"]["changes"]) or "nothing",
    }
    if not data:
        return facts
    facts["training pairs"] = f"{data['train_pairs']:,}"
    if data["lengths"]:
        facts["too long, left out"] = ", ".join(
            f"{split} {lengths['left_out']} of {lengths['pairs']:,}" for split, lengths in data["lengths"].items()
        )
    if data["cut"]:
        facts["test lines cut"] = (
            f"{data['cut']['cut']} of {data['cut']['lines']} (at {data['cut']['max_length']} subwords)"
        )
    if data["held_out_in_training"]:
        facts["held-out pairs in the training text"] = ", ".join(
            f"{Path(each['text']).name} {each['pairs']} of {each['lines']}" for each in data["held_out_in_training"]
        )
    if data["left_out_corpora"]:
        facts["corpora left out"] = "; ".join(data["left_out_corpora"])
    return facts
