"""Check the lengths of binary data against what a model takes, before it is trained, and tell what will be left out.

fairseq leaves out training pairs that exceed the model's positions or a batch, and validation pairs that exceed the
positions. A validation pair that fits the positions but not a batch ends the training. Only index files are read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.textio import DataError, language_pair
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.files import open_aside


@dataclass(frozen=True)
class Lengths:
    """Lengths of one split, in subwords with the end mark.

    Attributes:
        pairs: lines of each side.
        longest: of source and target.
        left_out: pairs that fairseq leaves out of training or validation.
    """

    pairs: int
    longest: tuple[int, int]
    left_out: int


def sizes(data: Path, split: str, pair: Sequence[str], side: int) -> np.ndarray:
    """Subwords of each line, end mark included. Raises: DataError if the split is not there."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    prefix = data / f"{split}.{'-'.join(pair)}.{pair[side]}"
    if not MMapIndexedDataset.exists(str(prefix)):
        raise DataError(f"{prefix}.idx: no such file; it is written by fairseq-preprocess")
    dataset = MMapIndexedDataset(str(prefix))
    return np.array(dataset.sizes)  # a copy: ``sizes`` is a view of memory that the dataset unmaps when it goes


def check_split(
    data: Path, split: str, pair: Sequence[str], limits: Sequence[int], max_tokens: int | None
) -> tuple[Lengths, list[str]]:
    """Measure ``train`` or ``valid``. Returns: its lengths, and messages for what would end the training.

    Args:
        limits: positions of source and target, end mark included.
        max_tokens: of one batch, or None for no limit.
    """
    columns = [sizes(data, split, pair, side) for side in (0, 1)]
    too_long = (columns[0] > limits[0]) | (columns[1] > limits[1])
    longer = np.maximum(*columns)
    over_batch = np.zeros_like(too_long) if max_tokens is None else longer > max_tokens
    problems = []
    if split == "train":
        too_long |= over_batch
    elif stuck := int((over_batch & ~too_long).sum()):
        problems.append(
            f"{stuck} pairs of {split} have more subwords (up to {longer[over_batch & ~too_long].max()}) than a batch "
            f"takes ({max_tokens}); raise dataset.max_tokens_valid, or leave them out"
        )
    left_out = int(too_long.sum())
    if left_out == len(too_long):
        allowed = f"{limits[0]} source and {limits[1]} target subwords" + (
            f", {max_tokens} a batch" if max_tokens else ""
        )
        problems.append(f"every pair of {split} is longer than the model takes ({allowed})")
    return Lengths(len(too_long), (int(columns[0].max()), int(columns[1].max())), left_out), problems


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("prepare lengths", __doc__)
    parser.flag("--data", type=Path, required=True)
    parser.flag("--pair", type=language_pair, required=True)
    add = parser.add_argument
    add("--max-source-positions", type=at_least(1), default=1024, metavar="N", help="of the model (default 1024)")
    add("--max-target-positions", type=at_least(1), default=1024, metavar="N", help="of the model (default 1024)")
    add("--batch-tokens", type=at_least(1), metavar="N", help="dataset.max_tokens of the training (default: no limit)")
    parser.flag("--out", help="write the figures to this JSON file")
    return parser.parse_args(argv)


@reports_errors("lengths")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    limits = args.max_source_positions, args.max_target_positions
    found, problems = {}, []
    for split in ("train", "valid"):
        found[split], more = check_split(args.data, split, args.pair, limits, args.batch_tokens)
        problems += more
        lengths = found[split]
        print(
            f"{split}: {lengths.pairs} pairs, up to {lengths.longest[0]} source and {lengths.longest[1]} target "
            f"subwords; {lengths.left_out} too long and left out"
        )
    if problems:
        raise DataError("; ".join(problems))
    if args.out:
        with open_aside([Path(args.out)]) as (file,):
            file.write((json.dumps({split: asdict(each) for split, each in found.items()}, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
