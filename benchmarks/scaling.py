"""Measure wall time of an MoE layer against its FLOPs and its granularity (the paper's Fig 8, redrawn).

    xmoe bench scaling [--sweeps flops experts granularity fine] [--tokens 4096] [--repeats 5]

There are four sweeps at D 512, each beside a dense FFN of 2048 units in the same turns:
  flops        inference: expert sizes of the paper, capacity lowered from the full FLOPs of the dense FFN to an eighth
  experts      training and inference: 8 to 512 experts of 512 (256) units, 4 (8) kept rows a token: only weights grow
  granularity  training: 8 x 2048 cut finer down to 512 x 32 at fixed FLOPs and parameters, up to 64 kept rows a token
  fine         inference and training: experts of size 1, one dense FFN cut in 2048, and 16,384 x 1, in bounded memory
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import add_timing_flags, compare, peak_bytes, settle_memory, table, write_result
from benchmarks.layer import DENSE, WIDTH, inference, train_step
from benchmarks.peers import DenseFFN, ExpertGemms
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.moe import MoEConfig, MoELayer

SIZES = ((32, 2048), (64, 1024), (128, 512), (256, 256))


def layer_of(num_experts: int, expert_dim: int, flops_share: float) -> MoELayer:
    """A layer whose full experts compute ``flops_share`` of a dense FFN's FLOPs."""
    gamma = flops_share * DENSE / expert_dim
    return MoELayer(
        MoEConfig(WIDTH, num_experts, expert_dim, capacity_factor=gamma, eval_capacity_factor=gamma, dense_dim=DENSE)
    )


def counted_share(layer: MoELayer, x_TD: torch.Tensor) -> float:
    """FLOPs of the rows that one pass computes, relative to the dense FFN."""
    with torch.no_grad():
        plan = layer(x_TD)[1]
    return plan.token_index_A.numel() * plan.row_cost / x_TD.size(0)


def sweep_flops(x_TD: torch.Tensor, options: argparse.Namespace) -> list[dict]:
    """Lower the capacity from the dense FFN's FLOPs to an eighth of them, for each expert size."""
    rows = []
    for experts, size in SIZES:
        layers = {f"{share:g}": layer_of(experts, size, share) for share in (1.0, 0.5, 0.25, 0.125)}
        found = sweep_layers("flops, infer", layers, x_TD, options, train=False)
        rows += [{**row, "case": f"{experts}x{size}"} for row in found if row["case"] != "dense"]
    return rows


def sweep_experts(x_TD: torch.Tensor, options: argparse.Namespace) -> list[dict]:
    """Add experts to choose from. FLOPs and kept rows stay; the weights grow 64 times, to 1.1 GB in float32."""
    rows = []
    for size in (512, 256):
        layers = {f"{experts}x{size}": layer_of(experts, size, 1.0) for experts in (8, 32, 128, 512)}
        for mode in ("infer", "train"):
            rows += sweep_layers(f"experts, {mode}", layers, x_TD, options, train=mode == "train")
        rows += sweep_gemms(layers, x_TD, options)
    return rows


def sweep_gemms(layers: dict[str, MoELayer], x_TD: torch.Tensor, options: argparse.Namespace) -> list[dict]:
    """Time the batched GEMMs of each layer alone, on full experts: a lower bound of its inference."""
    runs = {"dense": inference(DenseFFN(WIDTH, DENSE).to(x_TD), x_TD)}
    for name, layer in layers.items():
        config = layer.config
        count = config.capacity(x_TD.size(0), training=False)
        gemms = ExpertGemms(WIDTH, config.num_experts, config.expert_dim, count).to(x_TD)
        runs[name] = inference(gemms, x_TD.new_ones(config.num_experts * count, WIDTH))
    summary = compare(runs, options.repeats, options.device)
    return [{"sweep": "experts, GEMMs alone", "case": name, **row} for name, row in summary.items()]


def sweep_granularity(x_TD: torch.Tensor, options: argparse.Namespace) -> list[dict]:
    """Cut the dense FFN into experts of 2048 / g units, with gamma g."""
    sizes = ((8, 2048), (32, 512), (64, 256), (128, 128), (512, 32))
    layers = {f"{experts}x{size}": layer_of(experts, size, 1.0) for experts, size in sizes}
    return sweep_layers("granularity, train", layers, x_TD, options, train=True)


def sweep_layers(
    sweep: str,
    layers: dict[str, MoELayer],
    x_TD: torch.Tensor,
    options: argparse.Namespace,
    *,
    train: bool,
    dense_dim: int = DENSE,
) -> list[dict]:
    """Time, peak memory and FLOPs of layers that stand for the same dense FFN of ``dense_dim`` units."""
    modules = {"dense": DenseFFN(WIDTH, dense_dim), **layers}
    grad = torch.randn_like(x_TD)
    runs = {
        name: train_step(module.to(x_TD), x_TD, grad) if train else inference(module.to(x_TD), x_TD)
        for name, module in modules.items()
    }
    peaks = {name: peak_bytes(run, options.device) / 1e6 for name, run in runs.items()}
    summary = compare(runs, options.repeats, options.device)
    return [
        {
            "sweep": sweep,
            "case": name,
            **({"flops": counted_share(layers[name], x_TD)} if name in layers else {}),
            "peak_MB": peaks[name],
            **row,
        }
        for name, row in summary.items()
    ]


def sweep_fine(x_TD: torch.Tensor, options: argparse.Namespace) -> list[dict]:
    """Use experts of one hidden unit, as many as the dense FFN beside them has units."""
    rows = []
    for experts in (2048, 16384):
        layers = {f"{experts}x1": MoELayer(MoEConfig(WIDTH, experts, 1, capacity_factor=None, dense_dim=experts))}
        for mode in ("infer", "train"):
            rows += sweep_layers(f"fine, {mode}", layers, x_TD, options, train=mode == "train", dense_dim=experts)
    return rows


SWEEPS = {"flops": sweep_flops, "experts": sweep_experts, "granularity": sweep_granularity, "fine": sweep_fine}


def draw(rows: list[dict], path: Path) -> None:
    """Plot time against FLOPs, both relative to the dense FFN, one line per expert size (Fig 8)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    rows = [row for row in rows if row["sweep"].startswith("flops")]
    for case in dict.fromkeys(row["case"] for row in rows):
        line = sorted((row["flops"], row["ratio"]) for row in rows if row["case"] == case)
        axes.plot(*zip(*line, strict=True), marker="o", label=case)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="time = FLOPs")
    axes.set_xlabel("FLOPs / dense FFN's FLOPs")
    axes.set_ylabel("time / dense FFN's time")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@reports_errors("scaling")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweeps; the plot goes beside the JSON."""
    parser = command_parser("bench scaling", __doc__)
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS), help="default: all")
    parser.add_argument(
        "--tokens", type=at_least(1), default=4096, metavar="N", help="tokens of one call (default 4096)"
    )
    fine_help = "tokens of the sweep over experts of size 1 (default 1024)"
    parser.add_argument("--fine-tokens", type=at_least(1), default=1024, metavar="N", help=fine_help)
    add_timing_flags(parser, repeats=5)
    options = parser.parse_args(argv)
    settle_memory()
    like = {"dtype": getattr(torch, options.dtype), "device": options.device}
    x_TD = torch.randn(options.tokens, WIDTH, **like)
    few_TD = torch.randn(options.fine_tokens, WIDTH, **like)
    rows = [row for name in options.sweeps for row in SWEEPS[name](few_TD if name == "fine" else x_TD, options)]
    print(table(rows, ["sweep", "case", "flops", "ms", "ratio", "ratio_p10", "ratio_p90", "peak_MB"]))
    path = write_result(f"scaling-{options.dtype}-{options.device}", {"rows": rows}, options.out)
    if "flops" in options.sweeps:
        draw(rows, path.with_suffix(".png"))
    print("written:", path)


if __name__ == "__main__":
    sys.exit(main())
