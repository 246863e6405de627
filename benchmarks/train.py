"""Measure words per second of ``fairseq-train`` for several architectures, in turns.

    xmoe bench train [--data DATA_BIN] [--archs dense_transformer_wmt23 xmoe_transformer] [--updates 8]

Each turn is a fresh ``fairseq-train`` of a few updates, of which the first two are left out. The figure of an
architecture is the median over all its updates. Optimiser, logging and data loading are included. The table also shows
the optimiser's share of an update, since experts are most of the parameters.
Without ``--data`` the text is sentences of 5 to 40 random words out of 8,000.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import add_device_flag, add_out_flag, fairseq, table, write_result
from xmoe_fairseq.command_line import CommandParser, at_least, command_parser, reports_errors

USER_DIR = Path(__file__).resolve().parents[1] / "xmoe_fairseq"


def make_data(folder: Path, lines: int = 4000) -> Path:
    """Write random parallel sentences and binarise them. Returns: the folder of the binary data."""
    source = random.Random(1)
    words = [f"w{number}" for number in range(8000)]
    for split in ("train", "valid"):
        for language in ("xx", "yy"):
            text = "".join(" ".join(source.choices(words, k=source.randint(5, 40))) + "\n" for _ in range(lines))
            (folder / f"{split}.{language}").write_text(text)
        lines = 40
    command = [*fairseq("preprocess"), "-s", "xx", "-t", "yy", "--joined-dictionary", "--destdir", f"{folder}/bin"]
    command += ["--trainpref", f"{folder}/train", "--validpref", f"{folder}/valid"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bin"


# Runs fairseq-train and prints the seconds of each update and of the optimiser's part in it.
TIMED_TRAIN = """
import json, time
from fairseq.optim import FairseqOptimizer
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main

def timed(owner, name, seconds):
    inner = getattr(owner, name)
    def run(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)
    setattr(owner, name, run)

seconds = {"step": [], "train_step": []}
timed(FairseqOptimizer, "step", seconds["step"])
timed(Trainer, "train_step", seconds["train_step"])
cli_main()
print("SECONDS", json.dumps(seconds))
"""
SKIPPED = 2


def measure(arch: str, data: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Words per second and the optimiser's share of each update but the first ``SKIPPED``."""
    flags = f"""--arch {arch} --share-all-embeddings --optimizer {options.optimizer} --lr 5e-4
        --max-tokens {options.max_tokens} --criterion label_smoothed_cross_entropy_with_load_balance
        --label-smoothing 0.1 --max-update {options.updates}
        --no-save --disable-validation --log-format json --log-interval 1 --num-workers 0"""
    command = [sys.executable, "-c", TIMED_TRAIN, str(data), "--user-dir", options.user_dir, *flags.split()]
    command += ["--cpu"] if options.device == "cpu" else []
    command += options.extra
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"fairseq-train {' '.join(command[3:])} failed:\n{done.stderr[-2000:]}")
    rates: list[float] = []
    shares: list[float] = []
    for line in done.stdout.splitlines() + done.stderr.splitlines():
        if line.startswith("SECONDS "):
            seconds = json.loads(line.split(" ", 1)[1])
            shares = [part / whole for part, whole in zip(seconds["step"], seconds["train_step"], strict=True)]
        elif "train_inner" in line and "{" in line:
            rates.append(float(json.loads(line[line.index("{") :])["wps"]))
    return rates[SKIPPED:], shares[SKIPPED:]


def _parser() -> CommandParser:
    parser = command_parser("bench train", __doc__)
    parser.flag("--data", type=Path, help="folder of fairseq-preprocess (default: random sentences)")
    archs = ["dense_transformer_wmt23", "xmoe_transformer"]
    parser.add_argument("--archs", nargs="+", default=archs, metavar="NAME", help=f"default: {' '.join(archs)}")
    own = "package with architectures of your own (default: xmoe_fairseq)"
    parser.flag("--user-dir", default=str(USER_DIR), help=own)
    parser.add_argument("--updates", type=at_least(SKIPPED + 1), default=8, metavar="N", help="of a turn (default 8)")
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="turns (default 3)")
    parser.flag("--max-tokens", default=4096)
    parser.add_argument("--optimizer", default="fused_adam", help="fused_adam (default) or adam, fairseq's own")
    add_device_flag(parser)
    extra_help = "further flags of fairseq-train; must come last"
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help=extra_help)
    add_out_flag(parser)
    return parser


@reports_errors("train")
def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    rates: dict[str, list[float]] = {arch: [] for arch in options.archs}
    shares: dict[str, list[float]] = {arch: [] for arch in options.archs}
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or make_data(Path(folder))
        for _ in range(options.rounds):
            for arch in options.archs:
                more_rates, more_shares = measure(arch, data, options)
                rates[arch] += more_rates
                shares[arch] += more_shares
    base = statistics.median(rates[options.archs[0]])
    rows = [
        {
            "arch": arch,
            "words/s": statistics.median(found),
            "ratio": statistics.median(found) / base,
            "optimiser": statistics.median(shares[arch]),
            "updates": len(found),
        }
        for arch, found in rates.items()
    ]
    print(table(rows, ["arch", "words/s", "ratio", "optimiser", "updates"]))
    settings = {"max_tokens": options.max_tokens, "optimizer": options.optimizer, "extra": options.extra}
    print("written:", write_result(f"train-{options.device}", {"rows": rows, "settings": settings}, options.out))


if __name__ == "__main__":
    sys.exit(main())
