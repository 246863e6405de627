"""Encode text as the ids of GPT-2's byte-level subwords, line by line; their dict.txt is for fairseq-preprocess."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

from xmoe_fairseq.command_line import command_parser, reports_errors

_encode: Callable[[str], list[int]]


def _load(folder: str) -> None:
    global _encode
    _encode = get_encoder(f"{folder}/encoder.json", f"{folder}/vocab.bpe").encode


def encode_line(line: str) -> str:
    """Ids of one line, joined by spaces."""
    return " ".join(map(str, _encode(line.rstrip("\n"))))


@reports_errors("gpt2")
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("prepare gpt2", __doc__)
    parser.add_argument("--files", required=True, metavar="DIR", help="folder of encoder.json and vocab.bpe")
    parser.flag("--input", required=True, help="UTF-8 text; the ids go to standard output")
    parser.flag("--workers", default=1, help="processes")
    args = parser.parse_args(argv)
    for path in (Path(args.files, "encoder.json"), Path(args.files, "vocab.bpe"), Path(args.input)):
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    with (
        open(args.input, encoding="utf-8", newline="\n") as lines,
        multiprocessing.get_context("spawn").Pool(args.workers, _load, (args.files,)) as pool,
    ):
        for encoded in pool.imap(encode_line, lines, chunksize=1000):
            print(encoded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
