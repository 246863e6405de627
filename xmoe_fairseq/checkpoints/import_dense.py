"""Turn a dense fairseq transformer into a mixture of experts by cutting its feed-forward networks or copying them.

Axis letters: D model width, F hidden units of the dense FFN, E experts.

``split`` deals the F hidden units to E experts of F / E units. A MoE layer sums p_e * expert_e(x), where p is the
router's softmax. With router weights of zero every p_e is 1 / E, so the second map is scaled by E and each expert keeps
the whole output bias. At t = 1 the layer then computes the dense FFN, to rounding.

``copy`` (sparse up-cycling, arXiv 2212.05055) makes every expert the whole FFN and scales its second map and bias by E
/ n, where n experts are taken per token while all p are equal. With ``normalize_weights`` nothing is scaled, and the
result is the dense model's for every router.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY
from torch import Tensor

from ..command_line import CommandParser, command_parser, reports_errors
from ..files import keep_inputs
from ..moe import MoEConfig
from ..moe.registry import ROUTERS, router_class
from ..moe.settings import Setting, positive
from ..moe_args import argument_type, moe_config, moe_places, moe_settings
from .files import CheckpointError, State, load_checkpoint, save_checkpoint
from .settings import converted, flat_settings
from .structure import check_structure, describe_method

MODES = ("split", "copy")
GROUPINGS = ("contiguous", "random", "kmeans")
ROUTER_STARTS = ("zero", "random", "centroids")
ROUTER_SCALE = 0.02
# These settings compute as the dense model does: every expert on every token, without drops.
OWN_DEFAULTS = {"moe_threshold": 1.0, "moe_capacity_factor": None}


@dataclass(frozen=True)
class DenseImport:
    """How to make experts of a dense FFN.

    Attributes:
        num_experts: E; ``split`` needs F to be a multiple of it.
        mode: split or copy.
        grouping: which hidden units form an expert (split): contiguous, random, or kmeans (units with similar input
            weights together, groups of equal size; the idea of MoEfication, arXiv 2110.01786).
        router_start: zero (all p equal: exact, but ties all go to the lowest experts as soon as t < 1 or k < E),
            random, or centroids (mean input weights of the expert's units; copy has only one such mean and refuses).
        router_scale: root mean square of the router's entries for random and centroids. A larger scale takes p further
            from 1 / E, and the start further from the dense model.
        seed: of random choices.
    """

    num_experts: int
    mode: str = "split"
    grouping: str = "contiguous"
    router_start: str = "zero"
    router_scale: float = ROUTER_SCALE
    seed: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("grouping", GROUPINGS), ("router_start", ROUTER_STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(allowed)}")
        if self.num_experts < 1:
            raise ValueError(f"num_experts ({self.num_experts}) must be at least 1")
        if not positive(self.router_scale):
            raise ValueError(f"router_scale ({self.router_scale}) must be > 0; 0.02 starts close to the dense model")
        if self.mode == "copy" and self.router_start == "centroids":
            raise ValueError("copies have equal centroids; choose router_start zero or random")
        if self.mode == "copy" and self.grouping != "contiguous":
            raise ValueError(f"grouping ({self.grouping}) has no effect with mode copy, whose experts have all units")
        if self.router_start == "zero" and self.router_scale != ROUTER_SCALE:
            raise ValueError(f"router_scale ({self.router_scale}) has no effect with router_start zero; choose another")


def import_dense(state: State, how: DenseImport, moe: dict[str, Any]) -> State:
    """Make an ``xmoe_transformer`` (or ``xmoe_transformer_lm``) of a dense checkpoint.

    Args:
        state: from ``load_checkpoint``; arch transformer, transformer_lm or one of their named sizes.
        how: see ``DenseImport``.
        moe: ``moe_*`` settings of the new model (router, threshold, top_k, sides, interval, ...); number and size of
            the experts follow from ``how``.
    Returns:
        a checkpoint of this package, without optimiser state.
    Raises:
        CheckpointError: not a dense transformer, or sizes that do not divide.
        ValueError: settings that no MoE layer can have.
    """
    settings = _dense_settings(state)
    sides = [side for side in ("encoder", "decoder") if f"{side}.layers.0.fc1.weight" in state["model"]]
    if not sides:
        raise CheckpointError("the checkpoint has no layer with fc1 and fc2: it is not a dense fairseq transformer")
    arch = "xmoe_transformer" if "encoder" in sides else "xmoe_transformer_lm"
    settings |= {name: setting.default for name, setting in moe_settings().items()} | moe
    settings["moe_num_experts"] = how.num_experts
    view = argparse.Namespace(**settings)
    chosen = moe_places(view, sides)
    if not chosen:
        raise CheckpointError(f"moe_sides {view.moe_sides} and moe_interval {view.moe_interval} choose no layer")
    settings["moe_expert_dim"] = _expert_dim(settings, {side for side, _ in chosen}, how)
    scales = output_scales(_layer_config(settings, chosen), how)
    model = dict(state["model"])
    generator = torch.Generator().manual_seed(how.seed)
    for side, index in chosen:
        _replace_ffn(model, f"{side}.layers.{index}", how, scales, generator)
    new = converted(state, model, settings, arch, f"dense model, {how.mode}")
    check_structure(new)
    return new


def _dense_settings(state: State) -> dict[str, Any]:
    settings = flat_settings(state)
    arch = settings.get("arch") or settings.get("_name")
    if "moe_num_experts" in settings or "moe_type" in settings:
        raise CheckpointError(f"the checkpoint (arch {arch}) is already a mixture of experts")
    view = argparse.Namespace(**settings)
    if arch in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[arch](view)  # settings that a YAML left to the architecture's defaults
    return vars(view)


def _expert_dim(settings: dict[str, Any], sides: set[str], how: DenseImport) -> int:
    hidden = {settings[f"{side}_ffn_embed_dim"] for side in sides}
    if len(hidden) > 1:
        raise CheckpointError(
            f"the FFNs of encoder and decoder have {sorted(hidden)} hidden units; all experts of a model have one "
            "size: choose moe_sides encoder or decoder"
        )
    (units,) = hidden
    if how.mode == "copy":
        return int(units)
    if units % how.num_experts:
        raise CheckpointError(
            f"{units} hidden units cannot be cut into {how.num_experts} equal experts; choose a divisor"
        )
    return int(units // how.num_experts)


def _layer_config(settings: dict[str, Any], places: list[tuple[str, int]]) -> MoEConfig:
    """The configuration of the first MoE layer; this checks the settings as the model will."""
    side, index = places[0]
    view = argparse.Namespace(**settings, moe_places=places)
    widths = {"embed_dim": settings[f"{side}_embed_dim"], "dense_dim": settings[f"{side}_ffn_embed_dim"]}
    return moe_config(view, side=side, layer_index=index, **widths)


def output_scales(config: MoEConfig, how: DenseImport) -> tuple[float, float]:
    """Factors on the second map and its bias that compensate the weights of the experts while all p are equal.

    The router gives the number n of experts that it then takes and their weight, 1 / E, or 1 / n if it normalises.
    With ``copy`` the weights of the maps must sum to 1, with ``split`` each must be 1. The bias is shared by all
    experts in both.
    """
    router = router_class(config.router)
    if config.merge_experts or not router.weights_by_softmax or router.num_gates(config) != config.num_experts:
        raise ValueError(
            f"moe_router {config.router} does not weight experts by a softmax over them all; "
            "choose threshold, switch or top_k without merging or null experts"
        )
    with torch.no_grad():
        equal = router(config).eval()
        equal.weight.zero_()
        choices = equal(torch.zeros(1, config.embed_dim), None, None)
    taken = int(choices.chosen_TK.sum())
    weight = Fraction(float(choices.weight_TE[0, choices.expert_TK[0, 0]])).limit_denominator(config.num_experts)
    to_sum_one = float(1 / (taken * weight))
    return (to_sum_one if how.mode == "copy" else float(1 / weight)), to_sum_one


def _replace_ffn(
    model: dict[str, Tensor], layer: str, how: DenseImport, scales: tuple[float, float], generator: torch.Generator
) -> None:
    if f"{layer}.ffn_layernorm.weight" in model:
        raise CheckpointError(f"{layer} normalises its hidden units (--scale-fc), which experts cannot do")
    w1_FD, b1_F, w2_DF, b2_D = (
        model.pop(f"{layer}.{name}") for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    )
    experts = how.num_experts
    if how.mode == "copy":
        unit_EF = torch.arange(w1_FD.size(0)).expand(experts, -1)
    else:
        unit_EF = group_units(w1_FD, experts, how.grouping, generator)
    prefix = f"{layer}.moe"
    model[f"{prefix}.experts.w1"] = w1_FD[unit_EF].transpose(1, 2).contiguous()
    model[f"{prefix}.experts.b1"] = b1_F[unit_EF].clone()
    model[f"{prefix}.experts.w2"] = w2_DF.t()[unit_EF] * scales[0]
    model[f"{prefix}.experts.b2"] = (b2_D * scales[1]).expand(experts, -1).clone()
    model[f"{prefix}.router.weight"] = start_router(w1_FD, unit_EF, how, generator)


def group_units(w1_FD: Tensor, num_experts: int, grouping: str, generator: torch.Generator) -> Tensor:
    """int64 (E, F / E): the hidden units of each expert, where every unit is in exactly one expert.

    ``w1_FD``: float, one row of input weights per hidden unit.
    """
    if grouping == "kmeans":
        return _balanced_kmeans(w1_FD, num_experts, generator).view(num_experts, -1)
    units, draws = w1_FD.size(0), grouping == "random"
    return (torch.randperm(units, generator=generator) if draws else torch.arange(units)).view(num_experts, -1)


def _balanced_kmeans(w1_FD: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """int64 (F,): units sorted by group, by k-means of normalised rows and then the cheapest even assignment."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    row_FD = torch.nn.functional.normalize(w1_FD.float(), dim=-1).numpy()
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    distance_FE = KMeans(num_experts, n_init=1, random_state=seed).fit(row_FD).transform(row_FD)
    each = len(row_FD) // num_experts
    unit_F, place_F = linear_sum_assignment((distance_FE**2).repeat(each, axis=1))
    by_place = torch.from_numpy(place_F).argsort(stable=True)
    return torch.from_numpy(unit_F)[by_place]


def start_router(w1_FD: Tensor, unit_EF: Tensor, how: DenseImport, generator: torch.Generator) -> Tensor:
    """float (E, D), dtype of ``w1_FD``: the first router weights."""
    shape = (how.num_experts, w1_FD.size(1))
    if how.router_start == "zero":
        return torch.zeros(shape, dtype=w1_FD.dtype)
    if how.router_start == "random":
        start_ED = torch.randn(shape, generator=generator)
    else:
        start_ED = w1_FD.float()[unit_EF].mean(dim=1)
        start_ED = start_ED - start_ED.mean(dim=0)  # the mean of all experts does not choose between them
    rms = start_ED.square().mean().sqrt().clamp(min=1e-12)
    return (start_ED * (how.router_scale / rms)).to(w1_FD.dtype)


def _parser() -> CommandParser:
    parser = command_parser(
        "checkpoint import-dense",
        "Make a mixture of experts of a dense fairseq transformer. --mode split cuts each FFN into experts, which "
        "together compute it exactly at t = 1. --mode copy makes every expert a whole FFN (sparse up-cycling). The "
        "optimiser state is dropped; train the result with --finetune-from-model.",
    )
    parser.flag("--checkpoint", old="--input", required=True, help="dense checkpoint")
    parser.flag("--out", old="--output", required=True)
    parser.flag("--num-experts", required=True, help="experts per MoE layer")
    for flag, choices, text in (
        ("--mode", MODES, "cut the FFN up, or copy it"),
        ("--grouping", GROUPINGS, "split: which units form an expert"),
        ("--router-start", ROUTER_STARTS, "zero: exactly the dense model"),
    ):
        parser.add_argument(flag, choices=choices, default=choices[0], help=f"{text} (default {choices[0]})")
    entries = f"root mean square of the router's entries, unless they are zero (default {ROUTER_SCALE})"
    parser.add_argument("--router-scale", type=float, default=ROUTER_SCALE, help=entries)
    parser.flag("--seed", default=1, help="seed of random grouping, k-means and a random router")
    parser.add_argument("--router", choices=_routers(), help="default: threshold; copy: switch")
    for setting in _layer_flags():
        flag, default = setting.flag.replace("--moe-", "--"), OWN_DEFAULTS.get(setting.flat, setting.default)
        if setting.kind is bool:
            parser.add_argument(flag, action="store_true", help=setting.help)
        else:
            kind = argument_type(setting)
            text = setting.help if default is None else f"{setting.help} (default {default})"
            parser.add_argument(flag, type=kind, default=default, choices=setting.choices, help=text)
    return parser


def _routers() -> list[str]:
    """The routers whose layer can start as the dense FFN."""
    return [name for name, router in ROUTERS.items() if router.weights_by_softmax]


def _layer_flags() -> list[Setting]:
    """Flags of the new layers: their places and the settings of the routers."""
    names = {setting.flat for name in _routers() for setting in ROUTERS[name].settings}
    names |= {"moe_normalize_weights", "moe_capacity_factor", "moe_sides", "moe_interval"}
    return [setting for name, setting in moe_settings().items() if name in names]


@reports_errors("import-dense")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    keep_inputs(args.out, args.checkpoint)
    how = DenseImport(args.num_experts, args.mode, args.grouping, args.router_start, args.router_scale, args.seed)
    moe = {
        "moe_router": args.router or ("threshold" if args.mode == "split" else "switch"),
        **{setting.flat: getattr(args, setting.flat.removeprefix("moe_")) for setting in _layer_flags()},
    }
    new = import_dense(load_checkpoint(args.checkpoint), how, moe)
    save_checkpoint(new, args.out)
    print(f"{args.out}: {describe_method(flat_settings(new))}")


if __name__ == "__main__":
    sys.exit(main())
