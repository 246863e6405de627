"""Turn an exported folder back into a checkpoint for fairseq."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .command import run_command
from .files import save_checkpoint
from .safetensors_format import import_safetensors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xmoe_fairseq.checkpoints.import_safetensors",
        description="Make a checkpoint for fairseq-generate (or --finetune-from-model) of a folder that "
        "export_safetensors wrote. Tensors come back bit for bit.",
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="folder with model.safetensors and config.json")
    parser.add_argument("--output", required=True, metavar="PT", help="file to write; appears only when complete")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    save_checkpoint(import_safetensors(args.input), args.output)
    print(args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
