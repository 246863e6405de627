"""Sentences per second of ``fairseq-generate`` for several checkpoints on the same data, in turns.

    xmoe bench generate --data DATA_BIN dense=DIR/checkpoints/averaged.pt xmoe=DIR/checkpoints/averaged.pt

The first checkpoint is what the others are compared with. A name may carry settings for its model:
``"xmoe t 0.7"=PATH@{'moe_threshold': 0.7}``. Times are fairseq's own: search included, loading left out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import table, write_result
from xmoe_fairseq.command_line import command_parser

USER_DIR = Path(__file__).resolve().parents[1] / "xmoe_fairseq"
_SUMMARY = re.compile(r"Translated ([\d,]+) sentences \(([\d,]+) tokens\) in ([\d.]+)s")


def generate(path: str, overrides: str, options: argparse.Namespace) -> tuple[float, float]:
    """Sentences and tokens per second of one run."""
    command = ["fairseq-generate", str(options.data), "--user-dir", str(USER_DIR), "--path", path, "--quiet"]
    command += [
        "--beam",
        str(options.beam),
        "--batch-size",
        str(options.batch_size),
        "--required-batch-size-multiple",
        "1",
    ]
    command += ["--model-overrides", overrides, "--num-workers", "0"]
    command += ["--cpu"] if options.device == "cpu" else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = _SUMMARY.search(done.stdout + done.stderr)
    if done.returncode or not match:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    sentences, tokens = (float(match[group].replace(",", "")) for group in (1, 2))
    return sentences / float(match[3]), tokens / float(match[3])


def main() -> None:
    parser = command_parser("bench generate", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=PATH[@OVERRIDES]")
    parser.add_argument("--data", type=Path, required=True, help="binarised data with a test split")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", help="where the JSON goes (default: benchmarks/results/)")
    options = parser.parse_args()
    chosen = {}
    for text in options.checkpoints:
        name, separator, rest = text.partition("=")
        if not separator:
            parser.error(f"wants NAME=PATH, got {text!r}")
        path, _, overrides = rest.partition("@")
        chosen[name] = (path, overrides or "{}")
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name, (path, overrides) in chosen.items():
            runs[name].append(generate(path, overrides, options))
    medians = {name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in runs.items()}
    base = next(iter(medians.values()))[0]
    rows = [{"model": n, "sentences/s": s, "tokens/s": t, "ratio": s / base} for n, (s, t) in medians.items()]
    print(table(rows, ["model", "sentences/s", "tokens/s", "ratio"]))
    overrides = {name: override for name, (_, override) in chosen.items()}
    settings = {"beam": options.beam, "batch_size": options.batch_size, "overrides": overrides}
    print(
        "written:",
        write_result(
            f"generate-{options.device}",
            {"rows": rows, "settings": settings},
            options.out,
        ),
    )


if __name__ == "__main__":
    main()
