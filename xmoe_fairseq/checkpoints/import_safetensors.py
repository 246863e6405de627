"""Turn an exported folder back into a checkpoint for fairseq."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..command_line import CommandParser, command_parser, reports_errors
from .files import save_checkpoint
from .safetensors_format import import_safetensors


def _parser() -> CommandParser:
    parser = command_parser(
        "checkpoint import-safetensors",
        "Make a checkpoint for fairseq-generate (or --finetune-from-model) of a folder that "
        "export_safetensors wrote. Tensors come back bit for bit.",
    )
    parser.flag("--input", required=True, metavar="DIR", help="folder with model.safetensors and config.json")
    parser.flag("--out", old="--output", required=True)
    return parser


@reports_errors("import-safetensors")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    save_checkpoint(import_safetensors(args.input), args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
