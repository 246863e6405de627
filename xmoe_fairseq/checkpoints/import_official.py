"""Read models that were trained with the official XMoE code (github.com/ysngki/XMoE, a fork of fairseq).

Its MoE layers hold ``experts.yyh_local_experts.{e}.fc1/fc2`` and ``gate.wg``; the rest is fairseq's.
docs/checkpoints.md lists how its behaviour differs from ours and which differences an option brings back.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..command_line import CommandParser, command_parser, reports_errors
from ..files import keep_inputs
from .files import CheckpointError, State, load_checkpoint, save_checkpoint
from .official import ARCH as OFFICIAL_ARCH
from .settings import converted, flat_settings
from .structure import MissingExpertError, WrongSizeError, check_structure, describe_method

_EXPERT = re.compile(r"(.+\.layers\.\d+)\.experts\.yyh_local_experts\.(\d+)\.(fc[12]\.(?:weight|bias))")
_GATE = re.compile(r"(.+\.layers\.\d+)\.gate\.wg\.weight")
_OFFICIAL_SETTINGS = (
    "moe_type", "moe_k", "num_experts", "ffn_split_ratio", "expert_interval", "capacity_factor", "eval_capacity_factor",
    "threshold", "no_encoder_moe", "no_decoder_moe", "moe_loss_coeff",
)  # fmt: skip


def import_official(state: State, *, as_official: bool = False) -> State:
    """Turn a checkpoint of the official code into one of this package.

    Args:
        state: from ``load_checkpoint``.
        as_official: arch ``xmoe_transformer_as_official`` (official.py), whose outputs equal the official model's on
            the same batch; threshold router only. False: ``xmoe_transformer``, no drops or routed padding.
    Returns:
        a checkpoint of this package, without optimiser state.
    Raises:
        CheckpointError: not such a checkpoint, a router that never worked there (hash), or one that ``as_official``
            cannot repeat.
        MissingExpertError, WrongSizeError: experts are missing or of unequal size.
    """
    settings = flat_settings(state)
    if "moe_type" not in settings or "num_experts" not in settings:
        raise CheckpointError(
            "not a checkpoint of the official code: its settings hold no moe_type and num_experts; for dense models "
            "there is xmoe checkpoint import-dense"
        )
    model = convert_tensors(state["model"], settings["num_experts"])
    if as_official and settings["moe_type"] != "threshold":
        raise CheckpointError(
            f"--as-official repeats moe_type threshold; {settings['moe_type']} drops tokens in an arbitrary order (and "
            "topk adds noise at inference), so no two runs of the official code agree; import without --as-official"
        )
    arch = OFFICIAL_ARCH if as_official else "xmoe_transformer"
    new = converted(state, model, _our_settings(settings, as_official), arch, "official XMoE code")
    if new.get("cfg") and new["cfg"].get("criterion"):
        new["cfg"]["criterion"] = _our_criterion(new["cfg"]["criterion"])
    check_structure(new)
    return new


def convert_tensors(model: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Stack the experts of each layer and rename; tensors outside MoE layers stay as they are."""
    converted_model: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in model.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
        elif match := _GATE.fullmatch(name):
            converted_model[f"{match[1]}.moe.router.weight"] = tensor
        else:
            converted_model[name] = tensor
    if not experts:
        raise MissingExpertError("the checkpoint holds no experts (no tensor ...experts.yyh_local_experts...)")
    ours = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
    for (layer, part), tensors in experts.items():
        stacked = _stack(f"{layer} {part}", tensors, num_experts)
        converted_model[f"{layer}.moe.experts.{ours[part]}"] = (
            stacked.transpose(1, 2).contiguous() if part.endswith("weight") else stacked
        )
    return converted_model


def _stack(name: str, tensors: dict[int, Tensor], num_experts: int) -> Tensor:
    missing = sorted(set(range(num_experts)) - tensors.keys())
    if missing:
        raise MissingExpertError(
            f"{name}: experts {missing[:8]} of {num_experts} are missing; take the whole checkpoint"
        )
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(tensors) > num_experts or len(shapes) > 1:
        raise WrongSizeError(
            f"{name}: {len(tensors)} experts of shapes {sorted(shapes)}, the settings say {num_experts}"
        )
    return torch.stack([tensors[expert] for expert in range(num_experts)])


def _our_settings(settings: dict[str, Any], as_official: bool) -> dict[str, Any]:
    has_encoder = not settings.get("no_encoder_moe", False)
    has_decoder = not settings.get("no_decoder_moe", False)
    if not (has_encoder or has_decoder):
        raise CheckpointError("no_encoder_moe and no_decoder_moe are both set: the model has no MoE layer")
    hidden = {settings[f"{side}_ffn_embed_dim"] for side in ("encoder", "decoder")}
    if has_encoder and has_decoder and len(hidden) > 1:
        raise CheckpointError(f"experts of encoder and decoder differ in size ({sorted(hidden)} before the split)")
    side = "encoder" if has_encoder else "decoder"
    ours = {name: value for name, value in settings.items() if name not in _OFFICIAL_SETTINGS}
    ours |= {
        "moe_num_experts": settings["num_experts"],
        "moe_expert_dim": settings[f"{side}_ffn_embed_dim"] // settings["ffn_split_ratio"],
        "moe_interval": settings["expert_interval"],
        "moe_sides": "both" if has_encoder and has_decoder else side,
        "moe_capacity_factor": float(settings["capacity_factor"]),
        "moe_eval_capacity_factor": float(settings["eval_capacity_factor"]) if as_official else None,
        **_router_settings(settings),
    }
    return ours


def _router_settings(settings: dict[str, Any]) -> dict[str, Any]:
    kind, k = settings["moe_type"], settings.get("moe_k")
    if kind == "threshold":
        return {"moe_router": "threshold", "moe_threshold": settings["threshold"]}
    if kind == "base":
        return {"moe_router": "base"}
    if kind == "topk" and k == 1:
        return {"moe_router": "switch", "moe_top_k": 1}
    if kind == "topk":
        return {"moe_router": "top_k", "moe_top_k": k, "moe_router_noise": "gumbel"}
    raise CheckpointError(f"moe_type {kind!r} of the official code is not one that runs there: threshold, topk, base")


def _our_criterion(criterion: dict[str, Any]) -> dict[str, Any]:
    if "moe_loss_coeff" not in criterion:
        return criterion
    ours = {name: value for name, value in criterion.items() if name != "moe_loss_coeff"}
    name = "label_smoothed_cross_entropy_with_load_balance"
    return {**ours, "_name": name, "balance_loss_weight": criterion["moe_loss_coeff"]}


def _parser() -> CommandParser:
    parser = command_parser(
        "checkpoint import-official",
        "Convert a checkpoint of the official XMoE code (a fork of fairseq) for fairseq-generate "
        "--user-dir xmoe_fairseq. The optimiser state is dropped: train on with --finetune-from-model.",
    )
    parser.flag("--checkpoint", old="--input", required=True, help="checkpoint of the official code")
    parser.flag("--out", old="--output", required=True)
    parser.old_name("--as-released", "--as-official")
    parser.add_argument(
        "--as-official",
        action="store_true",
        help="keep the official inference: capacity drops tokens and padding is routed, so a translation depends on "
        "its batch (default: neither)",
    )
    return parser


@reports_errors("import-official")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    keep_inputs(args.out, args.checkpoint)
    new = import_official(load_checkpoint(args.checkpoint), as_official=args.as_official)
    save_checkpoint(new, args.out)
    settings = flat_settings(new)
    print(f"{args.out}: {describe_method(settings)}")
    if settings["moe_router"] == "threshold" and not args.as_official:
        gamma = settings["moe_capacity_factor"]
        override = {"moe_router": "top_k", "moe_top_k": max(1, round(gamma))}
        print(
            f"It learnt with at most gamma ({gamma}) experts a token on average. If inference without drops hurts it "
            f'(docs/checkpoints.md), give fairseq-generate --model-overrides "{override}"'
        )


if __name__ == "__main__":
    sys.exit(main())
