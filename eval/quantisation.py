"""Measure loss, BLEU and chrF2++ of a float checkpoint and of quantised ones, with paired tests.

xmoe quantisation --checkpoints float.pt int8.pt --data DATA_BIN --subwords FOLDER --source TEST.uk \\
    --references TEST.en --source-lang uk --target-lang en --out report.json

The first checkpoint is the baseline. Losses are over a split of the binary data (teacher forcing, no label smoothing),
translations over raw text. Tests are those of `xmoe compare`, paired bootstrap and approximate randomisation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.routing.corpus import binarised
from eval.routing.forward_passes import evaluate
from eval.text import files, significance
from eval.text.loading import load
from eval.text.translator import Translator, TranslatorConfig
from xmoe_fairseq.checkpoints.inspect import inspect_checkpoint
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors

USER_DIR = str(Path(__file__).resolve().parents[1] / "xmoe_fairseq")


def loss_bits(checkpoint: str, args: argparse.Namespace) -> float:
    """Mean cross entropy of a target token of ``--gen-subset``, in bits."""
    loaded = load(checkpoint, data=args.data, user_dir=args.user_dir, device=args.device)
    corpus = binarised(loaded, args.gen_subset)
    with torch.no_grad():
        figures = evaluate(loaded, corpus, corpus.indices, max_tokens=args.max_tokens)
    return float(figures["loss_bits"])


def translations(checkpoint: str, lines: Sequence[str], args: argparse.Namespace) -> list[str]:
    """One line of text for each line of ``lines``."""
    config = TranslatorConfig(
        paths=[checkpoint],
        data=args.data,
        source_lang=args.source_lang,
        target_lang=args.target_lang,
        subwords=args.subwords,
        user_dir=args.user_dir,
        beam=args.beam,
        max_tokens=args.max_tokens,
        device=args.device,
    )
    return [translation.text for translation in Translator(config).translate(lines)]


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Sizes, losses, share of lines with an equal translation, scores and tests, as plain data."""
    lines = files.read_lines(args.source)
    references = [files.read_lines(path) for path in args.references]
    models, systems = [], []
    for checkpoint in args.checkpoints:
        facts = inspect_checkpoint(checkpoint)
        systems.append((checkpoint, translations(checkpoint, lines, args)))
        same = sum(new == old for new, old in zip(systems[-1][1], systems[0][1], strict=True))
        models.append(
            {
                "checkpoint": checkpoint,
                "weights": facts["weights"],
                "bytes": facts["bytes"],
                "optimizer_state": facts["optimizer_state"],
                "loss_bits": loss_bits(checkpoint, args),
                "same_translations": same / max(len(lines), 1),
            }
        )
    tests = {
        method: significance.compare_systems(
            systems, references, method=method, target_language=args.target_lang, seed=args.seed
        )
        for method in significance.METHODS
    }
    settings = {"beam": args.beam, "gen_subset": args.gen_subset, "source": args.source, "lines": len(lines)}
    return {"models": models, "tests": tests, "settings": settings}


def format_report(found: dict[str, Any]) -> str:
    """A Markdown table of the models, followed by the two tables of tests."""
    lines = ["| checkpoint | weights | MB | loss (bits) | same lines |", "|---|---|---|---|---|"]
    for model in found["models"]:
        size = f"{model['bytes'] / 1e6:.1f}" + (" with optimiser" if model["optimizer_state"] else "")
        shares = f"{model['loss_bits']:.4f} | {model['same_translations']:.1%}"
        lines.append(f"| {model['checkpoint']} | {model['weights']} | {size} | {shares} |")
    return "\n\n".join(["\n".join(lines), *(significance.format_table(test) for test in found["tests"].values())])


def _parser() -> CommandParser:
    parser = command_parser("quantisation", __doc__)
    flag = parser.flag
    flag("--checkpoints", required=True, nargs="+", help="the float one first, then quantised ones")
    flag("--data", required=True)
    flag("--source-lang", required=True)
    flag("--target-lang", required=True)
    flag("--subwords", required=True)
    flag("--user-dir", default=USER_DIR, help="package with the models (default: xmoe_fairseq)")
    flag("--source", required=True)
    flag("--references", required=True, nargs="+")
    flag("--gen-subset", default="valid", help="split of the binary data for the loss")
    flag("--beam", default=5)
    flag("--max-tokens", default=4096)
    flag("--seed", help="positive (default: SACREBLEU_SEED, else 12345)")
    parser.device_flag()
    flag("--out", help="a JSON of all figures, unrounded")
    return parser


@reports_errors("quantisation")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = _parser().parse_args(argv)
    if len(args.checkpoints) < 2:
        raise ValueError("--checkpoints wants the float checkpoint and at least one quantised one")
    if args.out:
        files.check_writable(args.out)
    found = report(args)
    if args.out:
        files.write_json(args.out, found)
    print(format_report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
