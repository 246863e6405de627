"""Show what a checkpoint holds and check that it is sound."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_line import CommandParser, command_parser, reports_errors
from .fallback import latest_good
from .files import load_checkpoint, num_updates, verify_file
from .structure import check_structure, count_parameters, describe_method, describe_weights, model_settings, moe_layers


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Facts about one checkpoint, read after every check has passed.

    Returns:
        plain data: path, bytes, checksums (False: a format without), architecture, method, weights, updates, epoch,
        score, parameters, expert_parameters, dtypes, moe_layers, optimizer_state.
    Raises:
        CheckpointError: the file is damaged, unsafe, or its tensors are not those its settings ask for.
    """
    has_checksums = verify_file(path)
    state = load_checkpoint(path, verify=False, mmap=True)
    check_structure(state, path)
    settings, extra = model_settings(state), state.get("extra_state") or {}
    counts = count_parameters(state["model"])
    return {
        "path": str(path),
        "bytes": Path(path).stat().st_size,
        "checksums": has_checksums,
        "architecture": settings.get("arch") or settings.get("_name"),
        "method": describe_method(settings),
        "weights": describe_weights(settings),
        "moe_layers": [f"{side} {index}" for side, index in moe_layers(state)],
        "updates": num_updates(state),
        "epoch": (extra.get("train_iterator") or {}).get("epoch"),
        "score": extra.get("val_loss"),
        "parameters": counts["total"],
        "expert_parameters": counts["experts"],
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state["model"].values()}),
        "optimizer_state": state.get("last_optimizer_state") is not None,
    }


def _as_text(facts: dict[str, Any]) -> str:
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    shown["checksums"] = "agree" if facts["checksums"] else "none in this old format"
    for name in ("bytes", "parameters", "expert_parameters"):
        shown[name] = f"{facts[name]:,}"
    return "\n".join(f"{name.replace('_', ' '):18} {value}" for name, value in shown.items())


def _parser() -> CommandParser:
    parser = command_parser(
        "checkpoint inspect",
        "Show sizes, method, step and parameters of checkpoints, after checking that the file is whole, "
        "runs no code, and holds the tensors its settings ask for. Exit: 0 sound, 1 damaged.",
    )
    parser.add_argument("paths", nargs="*", metavar="PT", help="checkpoints")
    parser.flag("--json", help="one JSON object a line instead of text")
    parser.add_argument(
        "--fallback", metavar="DIR", help="instead: print the path of the last good checkpoint of a folder"
    )
    return parser


@reports_errors("inspect")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if bool(args.paths) == bool(args.fallback):
        parser.error("give checkpoints, or --fallback DIR")
    if args.fallback:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        print(latest_good(args.fallback))
    for path in args.paths:
        facts = inspect_checkpoint(path)
        print(json.dumps(facts) if args.json else _as_text(facts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
