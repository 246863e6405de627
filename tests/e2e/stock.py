"""fairseq's own commands, run in this process: the same code as on the command line without seconds of imports."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import random
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
USER_DIR = ROOT / "xmoe_fairseq"


def run(command: str, *arguments: object) -> str:
    """Run e.g. ``fairseq-train`` with ``arguments``; returns what it printed."""
    name = command.removeprefix("fairseq-").replace("-", "_")
    module = importlib.import_module(f"fairseq_cli.{name}")
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", [command, *map(str, arguments)]), contextlib.redirect_stdout(printed):
        module.cli_main()
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    return printed.getvalue()


def made_up_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of letters; the translation is the same word by word in capitals."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(count)]
    return [(line, line.upper()) for line in lines]


def binarised_pairs(folder: Path) -> Path:
    """A parallel data-bin with a joined dictionary: 40 training, 6 validation and 7 test sentences."""
    for split, count in (("train", 40), ("valid", 6), ("test", 7)):
        pairs = made_up_pairs(count, seed=count)
        for side, language in enumerate(("xx", "yy")):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (folder / f"{split}.{language}").write_text(text, encoding="utf-8")
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    out = folder / "bin"
    run("fairseq-preprocess", "-s", "xx", "-t", "yy", *prefixes, "--joined-dictionary", "--destdir", out)
    return out


def binarised_text(folder: Path) -> Path:
    """The source side of the same sentences, for a language model."""
    for split, count in (("train", 40), ("valid", 6), ("test", 7)):
        text = "".join(source + "\n" for source, _ in made_up_pairs(count, seed=count))
        (folder / split).write_text(text, encoding="utf-8")
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    out = folder / "bin"
    run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", out)
    return out


def train(data: Path, arch: str, save_dir: Path, *arguments: object, user_dir: Path = USER_DIR) -> Path:
    """Two updates of ``arch``; returns the checkpoint."""
    lm = arch.endswith("_lm")
    balanced = "_with_load_balance" if not arch.startswith("dense_transformer") else ""
    criterion = ("cross_entropy" if lm else "label_smoothed_cross_entropy") + balanced
    task = ("--task", "language_modeling", "--tokens-per-sample", 16) if lm else ("--share-all-embeddings",)
    common = ("--optimizer", "adam", "--lr", 1e-3, "--max-tokens", 200, "--cpu", "--num-workers", 0)
    common += ("--required-batch-size-multiple", 1)  # stock fairseq leaves out what does not fill a multiple of 8
    saving = ("--max-update", 2, "--save-dir", save_dir, "--no-epoch-checkpoints", "--no-progress-bar")
    run(
        "fairseq-train",
        *(data, "--user-dir", user_dir, "--arch", arch, "--criterion", criterion),
        *(*task, *common, *saving, *arguments),
    )
    return save_dir / "checkpoint_last.pt"


def generate(data: Path, checkpoint: Path, *arguments: object, user_dir: Path = USER_DIR) -> list[tuple[str, float]]:
    """The test set's best hypotheses and scores, in the order of the file."""
    printed = run(
        "fairseq-generate",
        *(data, "--user-dir", user_dir, "--path", checkpoint, "--beam", 3, "--max-len-b", 8, "--cpu"),
        *("--required-batch-size-multiple", 1, "--num-workers", 0, *arguments),
    )
    rows = [line[2:].split("\t") for line in printed.splitlines() if line.startswith("H-")]
    return [(text, float(score)) for _, score, text in sorted(rows, key=lambda row: int(row[0]))]
