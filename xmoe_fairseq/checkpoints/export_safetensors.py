"""Export a checkpoint as safetensors, a JSON configuration and a model card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .command import run_command
from .files import load_checkpoint
from .safetensors_format import export_safetensors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xmoe_fairseq.checkpoints.export_safetensors",
        description="Write model.safetensors, config.json and README.md (a model card to complete) of a checkpoint. "
        "The optimiser state and absolute paths in the settings are left out.",
    )
    parser.add_argument(
        "--input", required=True, metavar="PT", help="checkpoint of this package or a dense fairseq one"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    print(export_safetensors(load_checkpoint(args.input), args.output))


if __name__ == "__main__":
    sys.exit(run_command(main))
