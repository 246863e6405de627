"""Write the README.md of an exported model."""

from __future__ import annotations

from typing import Any

from .structure import describe_weights

_CARD = """# {arch}

A translation or language model trained with fairseq and the package `xmoe_fairseq`.

| | |
|---|---|
| Layers replaced by a mixture of experts | {method} |
| Languages | {languages} |
| Layers | {layers} |
| Weights | {weights} |
| Parameters | {parameters:,}, of them in experts {expert_parameters:,} |
| Optimiser updates | {num_updates:,} |
| Validation score when saved | {score} |

## Use

    xmoe checkpoint import-safetensors --input THIS_FOLDER --out model.pt
    fairseq-generate DATA_BIN --user-dir xmoe_fairseq --path model.pt

`DATA_BIN` is binarised with the dictionaries (`dict.*.txt`) and the subword model of the training; they are not part of
the tensors. Fill in below what is known of them.

## Files

- `model.safetensors`: the tensors. Expert e of a layer computes `activation(x @ w1[e] + b1[e]) @ w2[e] + b2[e]`.
  int8 experts hold `scale1[e, f] * q1[e, f, d]` for `w1[e, d, f]` and `scale2[e, d] * q2[e, d, f]` for `w2[e, f, d]`,
  other int8 maps `scale[o] * q[o, i]` for `weight[o, i]`.
- `config.json`: settings for fairseq, tied tensors, the sha256 of the tensors.

## To be filled in by the owner

Training data and its licences; scores with their sacreBLEU signatures; intended use and known failures; licence.
"""


def model_card(config: dict[str, Any]) -> str:
    """The card as Markdown, from the configuration that ``export_safetensors`` writes; the owner fills in the rest."""
    settings, task = config["cfg"]["model"], config["cfg"].get("task") or {}
    pair = [str(task[name]) for name in ("source_lang", "target_lang") if task.get(name)]
    layers = [
        f"{settings[f'{side}_layers']} {side}" for side in ("encoder", "decoder") if settings.get(f"{side}_layers")
    ]
    return _CARD.format(
        arch=settings.get("arch") or settings.get("_name"),
        method=config["method"],
        weights=describe_weights(settings),
        languages=" to ".join(pair) if len(pair) == 2 else "not recorded",
        layers=", ".join(layers),
        parameters=config["parameters"],
        expert_parameters=config["expert_parameters"],
        num_updates=config["num_updates"],
        score="not recorded" if config["score"] is None else config["score"],
    )
