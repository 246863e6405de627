"""Export a checkpoint as safetensors, a JSON configuration and a model card."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..command_line import CommandParser, command_parser, reports_errors
from .files import load_checkpoint
from .safetensors_format import export_safetensors


def _parser() -> CommandParser:
    parser = command_parser(
        "checkpoint export-safetensors",
        "Write model.safetensors, config.json and README.md (a model card to complete) of a checkpoint. "
        "The optimiser state and absolute paths in the settings are left out.",
    )
    parser.flag("--checkpoint", old="--input", required=True, help="of this package or a dense one of fairseq")
    parser.flag("--out", old="--output", required=True, metavar="DIR", help="folder to write to")
    return parser


@reports_errors("export-safetensors")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    card = Path(args.out, "README.md")
    if card.exists():
        print(f"export-safetensors: {card} is there already and stays as it is", file=sys.stderr)
    print(export_safetensors(load_checkpoint(args.checkpoint), args.out))


if __name__ == "__main__":
    sys.exit(main())
