"""Evaluate one checkpoint at several thresholds or inference capacities: quality against FLOPs.

Works for translation models (teacher forcing: the loss of the references) and for language models. Every point reads
all of the subset. FLOPs are counted from the routing plans, not from the settings.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

import xmoe_fairseq  # noqa: F401  registers models and lets checkpoints load
from eval.routing.corpus import Corpus, binarised
from eval.routing.forward_passes import evaluate, routing_settings
from eval.routing.layers import moe_layers
from eval.text import files
from eval.text.loading import Loaded, load
from xmoe_fairseq.command_line import command_parser, parse_overrides, reports_errors
from xmoe_fairseq.files import write_aside
from xmoe_fairseq.moe.flops import counted_flops


@dataclass(frozen=True)
class Point:
    """One setting and its measurements.

    Attributes:
        threshold: None where the layers kept thresholds of their own, or have none.
        eval_capacity_factor: None is no capacity.
        nll: mean negative log probability of a target token, nats.
        perplexity: exp(nll).
        moe_flops: FLOPs of the (token, expert) pairs that were computed, per token, relative to the dense FFN.
        experts_per_token: pairs that were computed, per token and MoE layer.
        dropped: share of the wanted pairs that capacity dropped.
        flops_per_token: forward FLOPs of all matrix products that ran, per target token. They include attention, the
            output projection, padding, and rows that the chosen way of computing adds (moe/experts/).
        target_tokens: number of scored tokens.
    """

    threshold: float | None
    eval_capacity_factor: float | None
    nll: float
    perplexity: float
    moe_flops: float
    experts_per_token: float
    dropped: float
    flops_per_token: float
    target_tokens: int


def measure(
    loaded: Loaded, corpus: Corpus, max_tokens: int, threshold: float | None, eval_capacity_factor: float | None
) -> Point:
    """Evaluate the whole corpus with one setting in every MoE layer; ``threshold`` None leaves the layers' own.

    Raises: ValueError for a value that is not allowed.
    """
    results: list[dict[str, Any]] = []
    changes = {"eval_capacity_factor": eval_capacity_factor} | ({} if threshold is None else {"threshold": threshold})
    with routing_settings(loaded.model, **changes):
        flops = counted_flops(lambda: results.append(evaluate(loaded, corpus, corpus.indices, max_tokens=max_tokens)))
    figures = results[0]
    return Point(
        threshold=threshold,
        eval_capacity_factor=eval_capacity_factor,
        nll=figures["loss_bits"] * math.log(2),
        perplexity=figures["perplexity"],
        moe_flops=figures["flops"],
        experts_per_token=figures["used"],
        dropped=figures["dropped"],
        flops_per_token=flops / figures["target_tokens"],
        target_tokens=figures["target_tokens"],
    )


def sweep(
    loaded: Loaded,
    corpus: Corpus,
    max_tokens: int,
    thresholds: Sequence[float],
    factors: Sequence[float | None],
) -> list[Point]:
    """Measure every pair of a threshold and a capacity factor; one that is not given stays the checkpoint's own.

    Raises: ValueError where a sweep has nothing to change.
    """
    layers = moe_layers(loaded.model)
    if not layers:
        raise ValueError(f"{loaded.paths[0]} has no MoE layer, so there is nothing to sweep")
    config = next(iter(layers.values())).config
    if thresholds and config.router != "threshold":
        raise ValueError(
            f"--thresholds has no effect on moe_router {config.router}; a top_k or switch checkpoint also runs with "
            "--model-overrides \"{'moe_router': 'threshold'}\""
        )
    own = {layer.config.threshold if config.router == "threshold" else None for layer in layers.values()}
    pairs = itertools.product(
        thresholds or [own.pop() if len(own) == 1 else None], factors or [config.eval_capacity_factor]
    )
    return [measure(loaded, corpus, max_tokens, *pair) for pair in tqdm(list(pairs), unit="setting", desc="sweep")]


def draw(points: Sequence[Point], path: Path) -> None:
    """Plot perplexity over MoE FLOPs, with one line per capacity factor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    swept = "threshold" if len({point.threshold for point in points}) > 1 else "eval_capacity_factor"
    lines: dict[float | None, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.moe_flops):
        lines.setdefault(point.eval_capacity_factor if swept == "threshold" else None, []).append(point)
    for factor, line in lines.items():
        label = "no capacity" if factor is None else f"capacity factor {factor:g}"
        axes.plot([p.moe_flops for p in line], [p.perplexity for p in line], marker="o", label=label)
        for point in line:
            value = getattr(point, swept)
            text = "none" if value is None else f"{value:g}"
            axes.annotate(text, (point.moe_flops, point.perplexity), xytext=(4, 4), textcoords="offset points")
    axes.set_title(f"at each point: {'t' if swept == 'threshold' else 'capacity factor'}", fontsize="medium")
    axes.set_xlabel("FLOPs of the MoE layers, relative to the dense FFN")
    axes.set_ylabel("perplexity")
    if len(lines) > 1:
        axes.legend()
    write_aside(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))
    plt.close(figure)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    told = "\nWrites OUT.json and OUT.png. Exit: 0 done, 1 failed, 2 bad arguments."
    parser = command_parser("sweep", f"{__doc__}{told}")
    parser.add_argument("old_data", nargs="?", help=argparse.SUPPRESS)
    flag = parser.flag
    flag("--checkpoint", old="--path", required=True)
    flag("--data")
    parser.numbers_flag("--thresholds", old="--threshold", default=[])
    capacities = "values of moe_eval_capacity_factor, > 0, or none; with a capacity results depend on the batches"
    parser.numbers_flag("--eval-capacity-factors", old="--eval-capacity-factor", default=[], help=capacities)
    flag("--gen-subset", default="test")
    flag("--max-tokens", default=4096)
    flag("--model-overrides", default="{}")
    flag("--user-dir", help="package with routers of your own; xmoe_fairseq is always there")
    parser.device_flag()
    flag("--out", default="sweep", metavar="PATH", help="path without ending")
    args = parser.parse_args(argv)
    if args.old_data:
        parser.warn(f"the folder is now --data {args.old_data}; a bare word goes in the next release")
    args.data = args.data or args.old_data
    if not args.data:
        parser.error("give --data, a folder of fairseq-preprocess")
    if not args.thresholds and not args.eval_capacity_factors:
        parser.error("give --thresholds or --eval-capacity-factors, or both")
    return args


def run(args: argparse.Namespace) -> list[Point]:
    """Measure every setting and write both files. Raises: ValueError, OSError."""
    files.check_writable(f"{args.out}.json")
    overrides = parse_overrides(args.model_overrides)
    loaded = load(args.checkpoint, data=args.data, user_dir=args.user_dir, overrides=overrides, device=args.device)
    corpus = binarised(loaded, args.gen_subset)
    points = sweep(loaded, corpus, args.max_tokens, args.thresholds, args.eval_capacity_factors)
    report = {
        "checkpoint": str(args.checkpoint),
        "data": str(args.data),
        "subset": args.gen_subset,
        "sentences": len(corpus.indices),
        "too_long": corpus.num_skipped,
        "max_tokens": args.max_tokens,
        "model_overrides": overrides,
        "points": [asdict(point) for point in points],
    }
    draw(points, Path(f"{args.out}.png"))
    files.write_json(f"{args.out}.json", report)
    return points


@reports_errors("sweep")
def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq logs each step of loading
    points = run(args)
    shown = ("threshold", "eval_capacity_factor", "moe_flops", "experts_per_token", "nll", "perplexity")
    rows = [[getattr(point, name) for name in shown] for point in points]
    print(tabulate(rows, shown, tablefmt="github", floatfmt=".4g", missingval="none"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
