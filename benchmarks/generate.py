"""Measure sentences per second, memory and file size of ``fairseq-generate`` for several checkpoints, in turns.

    xmoe bench generate --data DATA_BIN dense=DIR/checkpoints/averaged.pt xmoe=DIR/checkpoints/averaged.pt
    xmoe bench generate --random DIR --batch-sizes 1 64 --beams 1 5 [--ctranslate2]

Ratios are those to the first checkpoint. A name may carry settings for its model:
``"xmoe t 0.7"=PATH@{'moe_threshold': 0.7}``. Times are fairseq's own: they include the search and not the loading.
Memory is the process's largest resident set.

``--random`` makes models of xmoe_transformer's size with random weights, dense and sparse, in float32, bfloat16 and
int8 (random_models.py): 12 + 6 layers, 64 experts of 1,024, of which a token takes two, at the dense price. All
translations get one length. ``--ctranslate2`` adds CTranslate2's int8 of the dense model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import add_device_flag, add_out_flag, fairseq, table, write_result
from xmoe_fairseq.command_line import CommandParser, at_least, command_parser, reports_errors

USER_DIR = Path(__file__).resolve().parents[1] / "xmoe_fairseq"
_SUMMARY = re.compile(r"Translated ([\d,]+) sentences \(([\d,]+) tokens\) in ([\d.]+)s")
LENGTH = 24  # tokens of every translation of a random model
CTRANSLATE2 = "CTranslate2, dense int8"


class Run(NamedTuple):
    """Sentences and tokens per second, and the largest resident set in bytes."""

    sentences: float
    tokens: float
    memory: float


class Search(NamedTuple):
    """One cell of the table."""

    batch_size: int
    beam: int


def generate(path: str, overrides: str, search: Search, options: argparse.Namespace) -> Run:
    """One run of fairseq-generate in a process of its own."""
    command = [*fairseq("generate"), options.data, "--user-dir", options.user_dir, "--path", path, "--quiet"]
    command += ["--beam", search.beam, "--batch-size", search.batch_size, "--required-batch-size-multiple", 1]
    command += ["--model-overrides", overrides, "--num-workers", 0]
    command += ["--cpu"] if options.device == "cpu" else []
    command += ["--min-len", LENGTH, "--max-len-a", 0, "--max-len-b", LENGTH] if options.random else []
    output, memory = _watched([str(word) for word in command])
    match = _SUMMARY.search(output)
    if not match:
        raise ValueError(f"{' '.join(map(str, command))} did not say how long it took:\n{output[-2000:]}")
    sentences, tokens = (float(match[group].replace(",", "")) for group in (1, 2))
    return Run(sentences / float(match[3]), tokens / float(match[3]), memory)


def ctranslate2(checkpoint: str, search: Search, options: argparse.Namespace) -> tuple[Run, int]:
    """One run of CTranslate2's int8, and the bytes of its files."""
    command = [sys.executable, "-m", "benchmarks.ctranslate2_model", "--checkpoint", checkpoint]
    command += ["--data", str(options.data), "--beam", str(search.beam), "--batch-size", str(search.batch_size)]
    output, memory = _watched([*command, "--length", str(LENGTH)])
    facts = json.loads(output.splitlines()[-1])
    return Run(facts["sentences"], facts["tokens"], memory), facts["bytes"]


def _watched(command: list[str]) -> tuple[str, float]:
    """Both outputs of a command, and its largest resident set in bytes. Raises: ValueError if the command fails."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{text[-2000:]}")
    return text, usage.ru_maxrss * 1024.0


def measure(chosen: dict[str, tuple[str, str]], search: Search, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all checkpoints in turns. Returns: a row of medians for each."""
    names = [*chosen, CTRANSLATE2] if options.ctranslate2 else list(chosen)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    size = {name: Path(path).stat().st_size for name, (path, _) in chosen.items()}
    for _ in range(options.rounds):
        for name, (path, overrides) in chosen.items():
            runs[name].append(generate(path, overrides, search, options))
        if options.ctranslate2:
            run, size[CTRANSLATE2] = ctranslate2(chosen["dense float32"][0], search, options)
            runs[CTRANSLATE2].append(run)
    rows = []
    for name, found in runs.items():
        middle = Run(*(statistics.median(column) for column in zip(*found, strict=True)))
        rows.append(
            {
                "batch": search.batch_size,
                "beam": search.beam,
                "model": name,
                "sentences/s": middle.sentences,
                "tokens/s": middle.tokens,
                "ratio": middle.sentences / (rows[0]["sentences/s"] if rows else middle.sentences),
                "memory_MB": middle.memory / 1e6,
                "file_MB": size[name] / 1e6,
            }
        )
    return rows


def _parser() -> CommandParser:
    parser = command_parser("bench generate", __doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="NAME=PATH[@OVERRIDES]")
    parser.flag("--data", type=Path, help="binary data with a test split")
    parser.flag("--user-dir", default=str(USER_DIR), help="package with the models (default: xmoe_fairseq)")
    add("--random", type=Path, metavar="DIR", help="make models with random weights here (4.5 GB) and time those")
    add("--models", nargs="+", metavar="NAME", help="of the random models, the dense float32 one first (default: all)")
    add("--sentences", type=int, default=128, help="of the random test set (default 128)")
    add("--ctranslate2", action="store_true", help="also CTranslate2's int8 (pip install ctranslate2)")
    add("--beams", type=at_least(1), nargs="+", default=[5], metavar="N", help="default 5")
    add("--batch-sizes", type=at_least(1), nargs="+", default=[16], metavar="N", help="default 16")
    parser.old_name("--beam", "--beams")
    parser.old_name("--batch-size", "--batch-sizes")
    add("--rounds", type=at_least(1), default=3, metavar="N", help="turns of every checkpoint (default 3)")
    add_device_flag(parser)
    add_out_flag(parser)
    return parser


def _chosen(parser: CommandParser, options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Name -> (checkpoint, overrides)."""
    if bool(options.random) == bool(options.checkpoints):
        parser.error("give checkpoints and --data, or --random DIR")
    if options.random:
        from benchmarks.random_models import MODELS, make_checkpoints, make_data

        names = options.models or list(MODELS)
        if unknown := sorted(set(names) - set(MODELS)):
            parser.error(f"--models {', '.join(unknown)}: choose from {', '.join(MODELS)}")
        options.data = make_data(options.random, options.sentences)
        return {name: (path, "{}") for name, path in make_checkpoints(options.random, options.data, names).items()}
    if options.data is None or options.ctranslate2:
        parser.error("checkpoints need --data, and --ctranslate2 needs --random")
    chosen = {}
    for text in options.checkpoints:
        name, separator, rest = text.partition("=")
        if not separator:
            parser.error(f"wants NAME=PATH, got {text!r}")
        path, _, overrides = rest.partition("@")
        chosen[name] = (path, overrides or "{}")
    return chosen


@reports_errors("generate")
def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    chosen = _chosen(parser, options)
    rows = []
    for batch_size in options.batch_sizes:
        for beam in options.beams:
            rows += measure(chosen, Search(batch_size, beam), options)
    print(table(rows, list(rows[0])))
    settings = {
        "sentences": options.sentences if options.random else None,
        "overrides": {name: override for name, (_, override) in chosen.items()},
    }
    result = {"rows": rows, "settings": settings}
    print("written:", write_result(f"generate-{options.device}", result, options.out))


if __name__ == "__main__":
    sys.exit(main())
