"""Perplexity of a model on whole splits of its data, and what its MoE layers cost there, counted.

xmoe perplexity --checkpoint averaged.pt --data DATA_BIN --gen-subset valid test --thresholds 0.5 0.7 1.0

Every token is scored, end marks of lines too: of a language model each in its block of the training's
tokens_per_sample, of a translation model those of the references. Where a language model's data hold the sizes of
their text (text.json of scripts/run_lm.sh) there is a perplexity per word, with the end of a line as one more word,
and the bits per byte of UTF-8: these can be compared between subwords, the perplexity cannot.
--thresholds evaluates a model with XMoE's router at these as well.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

import xmoe_fairseq  # noqa: F401  registers models and lets checkpoints load
from eval.routing.corpus import binarised
from eval.routing.forward_passes import evaluate, routing_settings
from eval.routing.layers import moe_layers
from eval.text import files
from eval.text.loading import Loaded, load
from eval.text.units import SPLITS, in_units_of_text, text_sizes
from xmoe_fairseq.command_line import command_parser, parse_overrides, reports_errors


def measure(
    loaded: Loaded,
    split: str,
    size: Mapping[str, int] | None,
    *,
    max_tokens: int,
    thresholds: Sequence[float] = (),
) -> dict[str, Any]:
    """One split: ``loss_bits``, ``perplexity``, ``target_tokens``, those of `in_units_of_text`, and the ``routing``.

    ``flops`` of the MoE layers relative to the dense FFN and ``experts`` a token are None without MoE layers. ``sweep``
    has ``threshold``, ``loss_bits``, ``perplexity``, ``flops`` and ``experts`` for each of ``thresholds``.
    Raises: FileNotFoundError if there is no such split.
    """
    corpus = binarised(loaded, split)
    figures = evaluate(loaded, corpus, corpus.indices, max_tokens=max_tokens)
    sweep = []
    for threshold in tqdm(thresholds, desc=split, unit="threshold", disable=not thresholds):
        with routing_settings(loaded.model, threshold=threshold):
            found = evaluate(loaded, corpus, corpus.indices, max_tokens=max_tokens)
        kept = {name: found[name] for name in ("loss_bits", "perplexity", "flops")}
        sweep.append({"threshold": threshold, **kept, "experts": found["used"]})
    return {
        **{name: figures[name] for name in ("loss_bits", "perplexity", "target_tokens")},
        **in_units_of_text(figures["loss_bits"], figures["target_tokens"], size),
        "flops": figures["flops"],
        "experts": figures["used"],
        "routing": {
            "overall": {name: figures[name] for name in ("wanted", "used", "dropped", "flops")},
            "layers": figures["layers"],
        },
        "sweep": sweep,
    }


def swept(loaded: Loaded, args: argparse.Namespace) -> Sequence[float]:
    """The thresholds to evaluate at. Raises: ValueError for a router without one, unless --skip-others is given."""
    routers = {layer.config.router for layer in moe_layers(loaded.model).values()}
    if routers == {"threshold"} or not args.thresholds:
        return args.thresholds
    if not args.skip_others:
        found = f"moe_router {routers.pop()}" if routers else "no MoE layer"
        raise ValueError(f"--thresholds: {args.checkpoint} has {found}; only moe_router threshold has a threshold")
    return ()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("perplexity", f"{__doc__}\nExit: 0 done, 1 failed, 2 bad arguments.")
    parser.flag("--checkpoint", required=True)
    parser.flag("--data", required=True)
    parser.flag("--gen-subset", nargs="+", help="splits of the data (default: valid test)")
    parser.numbers_flag("--thresholds", default=[])
    skip_help = "--thresholds for a router that has none is no error: it is evaluated as it is"
    parser.add_argument("--skip-others", action="store_true", help=skip_help)
    parser.flag("--max-tokens", default=4096)
    parser.flag("--model-overrides", default="{}")
    parser.flag("--user-dir", help="package with routers of your own; xmoe_fairseq is always there")
    parser.device_flag()
    parser.flag("--out", help="write the figures to this file, as JSON")
    return parser.parse_args(argv)


@reports_errors("perplexity")
def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq tells of each step of loading
    if args.out:
        files.check_writable(args.out)
    overrides = parse_overrides(args.model_overrides)
    loaded = load(args.checkpoint, data=args.data, user_dir=args.user_dir, overrides=overrides, device=args.device)
    sizes = {} if loaded.is_translation else text_sizes(args.data)
    options = {"max_tokens": args.max_tokens, "thresholds": swept(loaded, args)}
    found = {split: measure(loaded, split, sizes.get(split), **options) for split in args.gen_subset or SPLITS[1:]}
    if args.out:
        files.write_json(
            args.out,
            {
                "checkpoint": str(args.checkpoint),
                "data": str(args.data),
                "max_tokens": args.max_tokens,
                "model_overrides": overrides,
                "subsets": found,
            },
        )
    shown = ("loss_bits", "perplexity", "word_perplexity", "bits_per_byte", "flops", "experts")
    rows = [
        [split, point.get("threshold"), *(point.get(name) for name in shown)]
        for split, figures in found.items()
        for point in (figures, *figures["sweep"])
    ]
    print(tabulate(rows, ["split", "threshold", *shown], tablefmt="github", floatfmt=".4f", missingval="–"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
