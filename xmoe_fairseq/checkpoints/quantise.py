"""Make an int8 (or bfloat16) checkpoint for inference out of a float one.

Every inference command loads the file (fairseq-generate, eval.translate, eval.serve, export_safetensors), and every
training refuses it. Each output channel has a scale; activations are quantised row by row during the translation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..command_line import CommandParser, command_parser, reports_errors
from ..files import keep_inputs
from ..moe import MoEConfig, MoELayer
from ..moe.quantised.experts import quantised_state
from ..moe.quantised.weights import dequantise, quantise_channels
from .files import CheckpointError, State, load_checkpoint, save_checkpoint, without_optimizer
from .settings import flat_settings
from .structure import check_structure, describe_weights, moe_layers, with_defaults

# Rows that compare a layer's outputs. They are Gaussian, as rows after a layer norm nearly are.
NUM_ROWS = 256


def quantise_checkpoint(state: State, to: str = "int8", what: str = "experts") -> State:
    """A checkpoint for inference with the weights in ``to`` and without optimiser state.

    Args:
        to: int8, or bfloat16 (experts only).
        what: experts, or all (experts, linear maps and embeddings; of a dense model every matrix).
    Raises:
        CheckpointError: settings that cannot be quantised, with the way out.
    """
    settings = flat_settings(state)
    _check(state, settings, to, what)
    model = dict(state["model"])
    for side, index in moe_layers(state):
        _hold_experts(model, f"{side}.layers.{index}.moe.experts.", to)
    changes: dict[str, Any] = {}
    if moe_layers(state):
        changes["moe_weights"] = to
    if what == "all":
        _hold_matrices(model)
        # a dense model gets an architecture of its own, since the stock one has no int8
        changes |= {"moe_linear_weights": "int8"} if moe_layers(state) else {"_name": _DENSE, "arch": _DENSE}
    namespace = argparse.Namespace(**{**settings, **changes})
    new = {**without_optimizer(state), "model": model}
    if state.get("cfg"):
        new["cfg"] = {**state["cfg"], "model": namespace}
    else:
        new["args"] = namespace
    new["extra_state"] = {**(state.get("extra_state") or {}), "quantised": {"to": to, "what": what}}
    check_structure(new, "the quantised checkpoint")
    return new


_DENSE = "int8_transformer"


def _check(state: State, settings: dict[str, Any], to: str, what: str) -> None:
    check_structure(state)
    if describe_weights(settings) != "float":
        raise CheckpointError(f"it is quantised already ({describe_weights(settings)}); give the float checkpoint")
    if settings.get("moe_merge_experts"):
        raise CheckpointError("merged experts (moe_merge_experts) add up their matrices in float; they stay so")
    if to == "bfloat16" and what == "all":
        raise CheckpointError("--to bfloat16 is for experts: use --what experts, or --to int8")
    if not moe_layers(state) and what == "experts":
        raise CheckpointError("the model has no experts: use --what all for a dense one")
    if any("adaptive_softmax" in name for name in state["model"]):
        raise CheckpointError("adaptive softmax is not supported with --what all; use --what experts")


def _hold_experts(model: dict[str, Tensor], prefix: str, to: str) -> None:
    if to == "bfloat16":
        for name in ("w1", "w2"):
            model[prefix + name] = model[prefix + name].bfloat16()
    else:
        model |= quantised_state(model, prefix)
        del model[prefix + "w1"], model[prefix + "w2"]
    for name in ("b1", "b2"):
        model[prefix + name] = model[prefix + name].float()


def _hold_matrices(model: dict[str, Tensor]) -> None:
    """Replace ``NAME.weight`` of linear maps and embeddings by ``NAME.q`` and ``NAME.scale``; ties stay."""
    made: dict[Any, tuple[Tensor, Tensor]] = {}
    for name in [name for name, tensor in model.items() if is_matrix(name, tensor)]:
        weight = model.pop(name)
        place = (weight.data_ptr(), tuple(weight.shape))
        if place not in made:
            q_1OI, scale_1O = quantise_channels(weight.unsqueeze(0))
            made[place] = q_1OI[0], scale_1O[0]
        parent = name.removesuffix("weight")
        model[parent + "q"], model[parent + "scale"] = made[place]


def is_matrix(name: str, tensor: Tensor) -> bool:
    """True if a tensor of a fairseq transformer is the weight of a linear map or of a token embedding.

    Routers and learned positions stay floats.
    """
    module = name.removesuffix(".weight").rpartition(".")[2]
    is_weight = name.endswith(".weight") and tensor.dim() == 2 and tensor.is_floating_point()
    return is_weight and module not in ("router", "embed_positions")


def layer_errors(before: State, after: State) -> list[dict[str, Any]]:
    """Relative errors (Frobenius norm) of each MoE layer: of its matrices, and of its output on Gaussian rows.

    The rows go through both kinds of experts, one expert a row, with a random router that uses all experts.
    """
    settings, rows = with_defaults(flat_settings(before)), []
    for side, index in moe_layers(before):
        prefix = f"{side}.layers.{index}.moe.experts."
        old, new = _under(before, prefix), _under(after, prefix)
        row: dict[str, Any] = {"layer": f"{side} {index}"}
        for name in ("w1", "w2"):
            row[name] = _relative(_as_float(new, name), old[name].float())
        row["output"] = _output_error(settings, side, old, new)
        rows.append(row)
    return rows


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state["model"].items() if name.startswith(prefix)}


def _as_float(tensors: dict[str, Tensor], name: str) -> Tensor:
    number = name[-1]
    if f"q{number}" in tensors:
        return dequantise(tensors[f"q{number}"], tensors[f"scale{number}"]).transpose(1, 2)
    return tensors[name].float()


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def _output_error(settings: dict[str, Any], side: str, old: dict[str, Tensor], new: dict[str, Tensor]) -> float:
    shape = {"embed_dim": settings[f"{side}_embed_dim"], "num_experts": settings["moe_num_experts"]}
    shape |= {"expert_dim": settings["moe_expert_dim"], "router": "top_k", "top_k": 1}
    x_TD = torch.randn(NUM_ROWS, shape["embed_dim"], generator=torch.Generator().manual_seed(0))
    outputs = []
    weights = "int8" if "q1" in new else "bfloat16"
    for held, tensors in (("float", old), (weights, new)):
        layer = MoELayer(MoEConfig(**shape, activation=str(settings["activation_fn"]), weights=held)).eval()
        torch.manual_seed(0)
        torch.nn.init.normal_(layer.router.weight)  # this scale spreads the rows over all experts
        layer.experts.load_state_dict(tensors)
        with torch.no_grad():
            outputs.append(layer(x_TD)[0])
    return _relative(outputs[1], outputs[0])


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'layer':14} {'w1':>9} {'w2':>9} {'output':>9}   relative error"]
    lines += [f"{row['layer']:14} {row['w1']:9.5f} {row['w2']:9.5f} {row['output']:9.5f}" for row in rows]
    return "\n".join(lines)


def _parser() -> CommandParser:
    parser = command_parser(
        "checkpoint quantise",
        "Make an int8 or bfloat16 checkpoint for inference, which no training takes. Prints both sizes and the error "
        "of every MoE layer; xmoe quantisation compares losses and translations.",
    )
    parser.flag("--checkpoint", required=True, help="a float one, sparse or dense")
    parser.flag("--out", required=True, metavar="PT", help="file to write; appears only when complete")
    parser.add_argument("--to", choices=("int8", "bfloat16"), default="int8", help="default: int8")
    parser.add_argument(
        "--what",
        choices=("experts", "all"),
        default="experts",
        help="experts (default), or all: linear maps and embeddings too, int8 only",
    )
    parser.flag("--json")
    return parser


@reports_errors("quantise")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    keep_inputs(args.out, args.checkpoint)
    before = load_checkpoint(args.checkpoint, mmap=True)
    after = quantise_checkpoint(before, args.to, args.what)
    save_checkpoint(after, args.out)
    report = {
        "input": {"path": args.checkpoint, "bytes": _model_bytes(before)},
        "output": {"path": args.out, "bytes": Path(args.out).stat().st_size},
        "to": args.to,
        "what": args.what,
        "layers": layer_errors(before, after),
    }
    if args.json:
        print(json.dumps(report))
        return
    if report["layers"]:
        print(_table(report["layers"]))
    sizes = [f"{report[end]['bytes'] / 1e6:,.1f} MB" for end in ("input", "output")]
    print(f"{args.out}: {sizes[1]} ({sizes[0]} of weights before)")


def _model_bytes(state: State) -> int:
    """Bytes of the model's tensors without the optimiser's; tied tensors count once."""
    places = {(t.data_ptr(), tuple(t.shape)): t.numel() * t.element_size() for t in state["model"].values()}
    return sum(places.values())


if __name__ == "__main__":
    sys.exit(main())
