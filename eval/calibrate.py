"""Choose the threshold and the limit of experts per token that bring a trained XMoE model to a given cost or loss.

xmoe calibrate --data DATA_BIN --checkpoint averaged.pt --out calibrated.pt --budget 1.0
xmoe calibrate --data DATA_BIN --checkpoint averaged.pt --out calibrated.pt --max-loss 0.01

--out gets a copy of the checkpoint that holds the setting, so that every command uses it without flags. Each token
still takes as many experts as it needs, and its routing does not depend on the batch.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

import xmoe_fairseq  # noqa: F401  registers models and lets checkpoints load
from eval.routing.calibration import ALLOWED, Calibration, NothingToCalibrateError, Point
from eval.routing.corpus import binarised
from eval.text import files
from eval.text.loading import Loaded, load
from xmoe_fairseq.checkpoints.files import load_checkpoint, save_checkpoint
from xmoe_fairseq.checkpoints.settings import with_model_settings
from xmoe_fairseq.command_line import command_parser, parse_overrides, reports_errors
from xmoe_fairseq.files import keep_inputs


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser("calibrate", f"{__doc__}\nExit: 0 done, 1 failed, 2 bad arguments.")
    parser.flag("--data", required=True)
    parser.flag("--checkpoint", required=True, help="a model with moe_router threshold")
    parser.flag("--out", required=True, help="the calibrated copy, for inference")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--budget", type=float, metavar="X", help="FLOPs of the MoE layers / dense FFN to spend, e.g. 1.0"
    )
    goal.add_argument(
        "--max-loss",
        type=float,
        default=0.01,
        metavar="BITS",
        help="the cheapest setting that loses at most this much on the validation set (default 0.01)",
    )
    add = parser.add_argument
    add("--per-layer", action="store_true", help="a threshold for each MoE layer; takes a few more passes")
    parser.flag("--gen-subset", default="valid", help="split to choose on")
    add("--check-subset", metavar="NAME", help="another split, on which loss and FLOPs are reported too")
    parser.flag("--max-tokens", default=4096)
    parser.flag("--model-overrides", default="{}", help="settings to change first; they go into the copy too")
    parser.flag("--user-dir", help="package with routers of your own; xmoe_fairseq is always there")
    parser.device_flag()
    add("--report", metavar="FILE", help="write everything that was measured to this file, as JSON")
    add(
        "--skip-others",
        action="store_true",
        help="exit 0 if there is no threshold router or the budget is below one expert; --report gets the reason",
    )
    return parser.parse_args(argv)


def choose(calibration: Calibration, args: argparse.Namespace) -> Point:
    """Search the setting that the command line asks for. Raises: ValueError if there is none."""
    if args.budget is None:
        point = calibration.cheapest(args.max_loss)
        if not args.per_layer:
            return point
        return calibration.shrink(calibration.refine(point, point.flops), args.max_loss)
    point = calibration.meet(args.budget)
    return calibration.refine(point, args.budget) if args.per_layer else point


def check(loaded: Loaded, split: str, settings: Sequence[Point], max_tokens: int) -> dict[str, Any]:
    """Measure loss and FLOPs of settings on another split."""
    calibration = Calibration(loaded, binarised(loaded, split), max_tokens=max_tokens)
    before, after = (_figures(calibration.measure(point.setting)) for point in settings)
    return {"subset": split, "before": before, "after": after}


def _figures(point: Point) -> dict[str, Any]:
    figures = asdict(point)
    del figures["setting"]
    return {**point.setting.as_settings(), **figures}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Choose a setting, write the copy and return the report. Raises: ValueError, OSError."""
    keep_inputs(args.out, args.checkpoint)
    for path in (args.out, args.report):
        if path is not None:
            files.check_writable(path)
    overrides = parse_overrides(args.model_overrides)
    start = time.perf_counter()
    loaded = load(args.checkpoint, data=args.data, user_dir=args.user_dir, overrides=overrides, device=args.device)
    corpus = binarised(loaded, args.gen_subset)
    calibration = Calibration(loaded, corpus, max_tokens=args.max_tokens)
    chosen = choose(calibration, args)
    report: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "out": str(args.out),
        "goal": {"budget": args.budget} if args.budget is not None else {"max_loss": args.max_loss},
        "per_layer": args.per_layer,
        "subset": args.gen_subset,
        "sentences": len(corpus.indices),
        "model_overrides": overrides,
        "before": _figures(calibration.before),
        "after": _figures(chosen),
        "budget_met": args.budget is None or abs(chosen.flops / args.budget - 1) <= ALLOWED,
        "measured": [_figures(point) for point in calibration.points],
    }
    if args.check_subset is not None:
        report["check"] = check(loaded, args.check_subset, (calibration.before, chosen), args.max_tokens)
    report["seconds"] = time.perf_counter() - start
    state = with_model_settings(load_checkpoint(args.checkpoint), {**overrides, **chosen.setting.as_settings()})
    extra = {**(state.get("extra_state") or {}), "calibrated": {**report["goal"], **chosen.setting.as_settings()}}
    save_checkpoint({**state, "extra_state": extra}, args.out)
    return report


def table(report: dict[str, Any]) -> str:
    """A table of the model before and after, with the experts of each layer."""
    shown = {report["subset"]: report, **({report["check"]["subset"]: report["check"]} if "check" in report else {})}
    rows = []
    for subset, part in shown.items():
        for when in ("before", "after"):
            figures = part[when]
            threshold = figures["moe_threshold"]
            text = f"{threshold:.4f}" if isinstance(threshold, float) else ", ".join(f"{t:.4f}" for t in threshold)
            limit = "none" if figures["moe_max_experts"] is None else figures["moe_max_experts"]
            row = [subset, when, text, limit, f"{figures['loss_bits']:.4f}", f"{figures['flops']:.3f}"]
            rows.append([*row, ", ".join(f"{n:.2f}" for n in figures["layers"].values())])
    headers = [
        "text",
        "",
        "threshold",
        "most experts",
        "loss (bits)",
        "MoE FLOPs / dense",
        "experts per token, by layer",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


@reports_errors("calibrate")
def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq logs each step of loading
    try:
        report = run(args)
    except NothingToCalibrateError as error:
        if not args.skip_others:
            raise
        print(f"calibrate: nothing to do: {error}", file=sys.stderr)
        if args.report:
            files.write_json(args.report, {"checkpoint": str(args.checkpoint), "after": None, "reason": str(error)})
        return 0
    if args.report:
        files.write_json(args.report, report)
    print(table(report))
    if not report["budget_met"]:
        print(
            f"calibrate: the budget of {args.budget:g} cannot be met closely: this model costs "
            f"{report['after']['flops']:.3f} at the nearest setting",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
