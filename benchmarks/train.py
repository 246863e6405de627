"""Words per second of ``fairseq-train`` for several architectures, in turns.

    python -m benchmarks.train [--data DATA_BIN] [--archs dense_transformer_wmt23 xmoe_transformer] [--updates 6]

Each turn is a fresh ``fairseq-train`` of a few updates; the first two updates of a turn are left out. The figure of an
architecture is the median over all its updates. Optimiser, logging and data loading are included, as a user has them.
``--data`` is a folder of fairseq-preprocess; without it, sentences of 5 to 40 random words of 8,000.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import table, write_result

USER_DIR = Path(__file__).resolve().parents[1] / "xmoe_fairseq"


def make_data(folder: Path, lines: int = 4000) -> Path:
    """Random parallel sentences, binarised."""
    source = random.Random(1)
    words = [f"w{number}" for number in range(8000)]
    for split in ("train", "valid"):
        for language in ("xx", "yy"):
            text = "".join(" ".join(source.choices(words, k=source.randint(5, 40))) + "\n" for _ in range(lines))
            (folder / f"{split}.{language}").write_text(text)
        lines = 40
    command = [
        "fairseq-preprocess",
        "-s",
        "xx",
        "-t",
        "yy",
        "--trainpref",
        f"{folder}/train",
        "--validpref",
        f"{folder}/valid",
    ]
    subprocess.run([*command, "--destdir", f"{folder}/bin", "--joined-dictionary"], check=True, capture_output=True)
    return folder / "bin"


def words_per_second(arch: str, data: Path, options: argparse.Namespace) -> list[float]:
    """Words per second of each update but the first two, from the training log."""
    command = [
        "fairseq-train",
        str(data),
        "--user-dir",
        str(USER_DIR),
        "--arch",
        arch,
        "--share-all-embeddings",
    ]
    command += ["--criterion", "label_smoothed_cross_entropy_with_load_balance", "--label-smoothing", "0.1"]
    command += [
        "--optimizer",
        "adam",
        "--lr",
        "5e-4",
        "--max-tokens",
        str(options.max_tokens),
        "--max-update",
        str(options.updates),
    ]
    command += [
        "--no-save",
        "--disable-validation",
        "--log-format",
        "json",
        "--log-interval",
        "1",
        "--num-workers",
        "0",
    ]
    command += ["--cpu"] if options.device == "cpu" else []
    command += options.extra
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = []
    for line in done.stdout.splitlines() + done.stderr.splitlines():
        if "train_inner" in line and "{" in line:
            entry = json.loads(line[line.index("{") :])
            if "wps" in entry:
                found.append(float(entry["wps"]))
    return found[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--archs", nargs="+", default=["dense_transformer_wmt23", "xmoe_transformer"])
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], help="further flags of fairseq-train; must come last"
    )
    parser.add_argument("--out", help="where the JSON goes (default: benchmarks/results/)")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {arch: [] for arch in options.archs}
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or make_data(Path(folder))
        for _ in range(options.rounds):
            for arch in options.archs:
                rates[arch] += words_per_second(arch, data, options)
    base = statistics.median(rates[options.archs[0]])
    rows = [
        {
            "arch": arch,
            "words/s": statistics.median(found),
            "ratio": statistics.median(found) / base,
            "updates": len(found),
        }
        for arch, found in rates.items()
    ]
    print(table(rows, ["arch", "words/s", "ratio", "updates"]))
    settings = {"max_tokens": options.max_tokens, "extra": options.extra}
    print("written:", write_result(f"train-{options.device}", {"rows": rows, "settings": settings}, options.out))


if __name__ == "__main__":
    main()
