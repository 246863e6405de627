"""Make the demo's corpus: phrases of real languages with a known translation, without a download.

CLDR (by Babel) gives the same date, time, span, unit, amount, country or language in both languages,
num2words spells numbers out. Phrases are joined by the list patterns of CLDR ("A, B, and C") or as
"label: item". Held-out lines are new combinations, so a model must learn names, inflection and order.

- The source determines the target: where two styles look alike in the source language, the first one
  gives the target. No line occurs twice on either side, in one split or across splits.
- Other spaces become U+0020 and bidirectional marks are removed, since they are typography.
- zh-en has no spelled-out numbers: num2words has no Chinese, and Babel lacks CLDR's spell-out rules.
"""

import argparse
import importlib.metadata
import random
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep.phrase_maker import SOURCES, Phrase, phrase_maker
from data_prep.textio import DataError
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.files import open_aside, sha256_of

PINNED = {"babel": "2.18.0", "num2words": "0.5.14"}
MIN_WORDS, MAX_WORDS = 3, 20  # of the English side
MAX_MISSES = 20_000  # candidates in a row that are no new line before make_corpus gives up


def make_corpus(source_code: str, sizes: dict[str, int], seed: int) -> dict[str, list[Phrase]]:
    """Make the splits in the order of ``sizes``; equal arguments and pinned versions give equal splits.

    Raises: DataError if no new line could be found for a long time.
    """
    maker, rng = phrase_maker(source_code), random.Random(f"{source_code}-en {seed}")
    seen_source: set[str] = set()
    seen_target: set[str] = set()
    splits: dict[str, list[Phrase]] = {}
    progress = tqdm(total=sum(sizes.values()), desc=f"phrases {source_code}-en", unit="line", disable=None)
    for split, size in sizes.items():
        splits[split], misses = [], 0
        while len(splits[split]) < size:
            source, target = maker.line(rng)
            if source in seen_source or target in seen_target or not is_usable(target):
                misses += 1
                if misses > MAX_MISSES:
                    raise DataError(f"--{split} {size}: no new line after {len(seen_source)} lines; ask for fewer")
                continue
            misses = 0
            seen_source.add(source)
            seen_target.add(target)
            splits[split].append((source, target))
            progress.update()
    progress.close()
    return splits


def is_usable(target: str) -> bool:
    """True if ``target`` has 3 to 20 words and nothing that a subword model's NFKC would change (a raised 2)."""
    return MIN_WORDS <= len(target.split()) <= MAX_WORDS and unicodedata.normalize("NFKC", target) == target


def write_corpus(folder: Path, source_code: str, splits: dict[str, list[Phrase]]) -> list[Path]:
    """Write ``folder/SPLIT.SRC`` and ``folder/SPLIT.en`` of all splits, or none on failure."""
    paths = [folder / f"{split}.{language}" for split in splits for language in (source_code, "en")]
    with open_aside(paths) as files:
        for index, lines in enumerate(splits.values()):
            for side in (0, 1):
                files[2 * index + side].write("".join(f"{line[side]}\n" for line in lines).encode())
    return paths


def source_of(text: str) -> str:
    if text not in [f"{source}-en" for source in SOURCES]:
        allowed = ", ".join(f"{source}-en" for source in SOURCES)
        raise argparse.ArgumentTypeError(f"must be one of {allowed}; got {text!r}")
    return text.split("-")[0]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("prepare phrases", __doc__.split("\n")[0])
    parser.flag("--pair", type=source_of, default="uk-en", metavar="SRC-en", help="SRC is uk, de, ru, he or zh")
    parser.flag("--out", type=Path, required=True, metavar="DIR", help="folder for {train,valid,test}.{SRC,en}")
    parser.flag("--seed", default=1, help="seed of the corpus")
    for split, size in (("train", 12_000), ("valid", 500), ("test", 500)):
        parser.add_argument(f"--{split}", type=at_least(1), default=size, metavar="N", help=f"lines (default {size})")
    return parser.parse_args(argv)


@reports_errors("phrases")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    for package, pinned in PINNED.items():
        if (found := importlib.metadata.version(package)) != pinned:
            print(
                f"phrases: warning: {package} {found}, not {pinned}: another corpus than the pinned one",
                file=sys.stderr,
            )
    # test and valid come first, so that they stay the same when only --train changes
    splits = make_corpus(args.pair, {"test": args.test, "valid": args.valid, "train": args.train}, args.seed)
    for path in write_corpus(args.out, args.pair, splits):
        print(f"{path}: {path.read_bytes().count(10)} lines, sha256 {sha256_of(path)[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
