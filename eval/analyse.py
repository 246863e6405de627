"""Analyse what a trained model's router does on a test set, and write one JSON of all figures.

xmoe analyse --checkpoint FILE --data DIR --user-dir xmoe_fairseq --out analysis.json

This runs forward passes with teacher forcing and counts from their routing plans: load, dead experts, experts by kind,
frequency and place of a token, agreement of layers, similarity of experts, positive hidden units. With --subwords it
also translates, for the routing explorer and for BLEU. Then it repeats the passes at lower thresholds and capacities.
`xmoe report` draws the page, and docs/reading-a-routing.md explains every figure and the JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.routing import corpus as corpora
from eval.routing import forward_passes, translation
from eval.routing.layers import moe_layers
from eval.routing.summary import describe, finite, problems
from eval.run.history import read_history
from eval.text import files
from eval.text.loading import Loaded, load
from eval.text.subwords import load_subwords
from xmoe_fairseq.command_line import CommandParser, at_least, command_parser, parse_overrides, reports_errors

SCHEMA = 1
DEFAULT_CAPACITIES = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
DEFAULT_THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)


def analyse(args: argparse.Namespace) -> dict[str, Any]:
    """Compute everything that the command line asks for. Raises: ValueError, FileNotFoundError."""
    history = read_history(args.training_log) if args.training_log else None
    loaded = load(
        args.checkpoint,
        data=args.data,
        user_dir=args.user_dir,
        overrides=parse_overrides(args.model_overrides),
        device=args.device,
    )
    corpus = _corpus(args, loaded)
    result = {
        "schema": SCHEMA,
        "checkpoint": describe(loaded),
        "data": {
            "set": args.source or args.gen_subset,
            "sentences": len(corpus.indices),
            "skipped": corpus.num_skipped,
        },
        **forward_passes.observe(loaded, corpus, max_tokens=args.max_tokens, progress=True),
        "history": history,
    }
    search, references = _search(args, loaded, corpus)
    with tqdm(total=_num_points(args, loaded), unit="pass", desc="sweeps") as bar:
        result["sweeps"] = _sweeps(args, loaded, corpus, search, references, bar)
    result["checkpoints"] = [_checkpoint_point(args, path) for path in args.more_checkpoints]
    result["explorer"] = _explorer(args, loaded, corpus, search, references)
    result["problems"] = problems(result)
    return finite(result)


def _corpus(args: argparse.Namespace, loaded: Loaded) -> corpora.Corpus:
    if not args.source:
        return corpora.binarised(loaded, args.gen_subset)
    if not loaded.is_translation:
        raise ValueError("--source is raw text for a translation model; give a language model binarised data")
    bpe = load_subwords(args.subwords, loaded.task.cfg.source_lang, loaded.task.cfg.target_lang)
    lines = [[bpe.encode(line) for line in files.read_lines(path)] for path in (args.source, args.references)]
    return corpora.from_lines(loaded, *lines)


def _search(args: argparse.Namespace, loaded: Loaded, corpus: corpora.Corpus) -> tuple[Any, dict[int, str]]:
    """A beam search and the references, or None if no translation is asked for."""
    if not args.subwords or not loaded.is_translation:
        return None, {}
    search = translation.Search(loaded, args.subwords, beam=args.beam, max_tokens=args.max_tokens)
    chosen = {*corpus.evenly(args.translate).tolist(), *corpus.evenly(args.explore).tolist()}
    if not args.references:
        return search, search.references(corpus, sorted(chosen))
    lines = files.read_lines(args.references)
    if len(lines) != len(corpus.dataset):
        raise ValueError(
            f"{args.references} has {len(lines)} lines, the test set {len(corpus.dataset)} sentences; line n must be "
            "sentence n"
        )
    return search, {index: lines[index] for index in chosen}


def _points(args: argparse.Namespace, loaded: Loaded) -> dict[str, list[dict[str, Any]]]:
    """Name of a sweep -> the settings of its points; capacity None, which drops nothing, comes last."""
    layers = moe_layers(loaded.model)
    if not layers or any(layer.config.merge_experts for layer in layers.values()):
        return {}  # merged experts drop nothing
    given = [value for value in args.eval_capacity_factors if value is not None]
    points = {"capacity": [{"eval_capacity_factor": value} for value in (*given, None)]}
    if all(layer.config.router == "threshold" for layer in layers.values()):
        points["threshold"] = [{"threshold": value} for value in args.thresholds]
    return points


def _num_points(args: argparse.Namespace, loaded: Loaded) -> int:
    return sum(len(points) for points in _points(args, loaded).values())


def _sweeps(args: Any, loaded: Loaded, corpus: Any, search: Any, references: Any, bar: Any) -> dict[str, Any]:
    """Measure quality against counted FLOPs; each point is a pass over the same sentences with other settings."""
    indices, spoken = corpus.evenly(args.sweep_sentences), corpus.evenly(args.translate)
    language = getattr(loaded.task.cfg, "target_lang", None)
    result: dict[str, Any] = {}
    for name, points in _points(args, loaded).items():
        result[name] = []
        for setting in points:
            with forward_passes.routing_settings(loaded.model, **setting):
                point = {**setting, **forward_passes.evaluate(loaded, corpus, indices, max_tokens=args.max_tokens)}
                if search is not None and len(spoken):
                    point["translation"] = _translated(search, corpus, spoken, references, language)
            result[name].append(point)
            bar.update()
    return result


def _translated(search: Any, corpus: Any, indices: np.ndarray, references: Any, language: str) -> dict[str, Any]:
    found, figures = search.translate(corpus, indices)
    return {
        "sentences": len(found),
        "flops": figures["flops"],
        **translation.scores(found, references, language),
    }


def _checkpoint_point(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Loss and routing of one more checkpoint, for Fig 5 along a training or Fig 7 across thresholds."""
    loaded = load(path, data=args.data, user_dir=args.user_dir, device=args.device)
    corpus = _corpus(args, loaded)
    described = describe(loaded)
    kept = {name: described[name] for name in ("path", "num_updates", "router", "threshold", "top_k")}
    return kept | forward_passes.evaluate(
        loaded, corpus, corpus.evenly(args.sweep_sentences), max_tokens=args.max_tokens
    )


def _explorer(args: Any, loaded: Loaded, corpus: Any, search: Any, references: Any) -> list[dict[str, Any]]:
    if search is None or not args.explore:
        return []
    indices = corpus.evenly(args.explore)
    found, _ = search.translate(corpus, indices)
    order = sorted(found)
    dictionary = loaded.task.source_dictionary
    source = [dictionary.string(corpus.dataset[index]["source"]) for index in order]
    routed = translation.routing_of(loaded, source, [found[index].pieces for index in order], args.max_tokens)
    return [
        {
            "id": index,
            **sentence,
            "translation": found[index].text,
            "score": found[index].score,
            "reference": references.get(index),
        }
        for index, sentence in zip(order, routed, strict=True)
        if sentence is not None
    ]


def _parser() -> CommandParser:
    parser = command_parser("analyse", __doc__)
    flag, add = parser.flag, parser.add_argument
    flag("--checkpoint", old="--path", required=True, help="the model to analyse")
    flag("--data", required=True)
    flag("--user-dir")
    flag("--out", old="--output", required=True, help="the JSON to write")
    flag("--gen-subset", default="test", help="binarised set to analyse")
    flag("--source", help="raw text instead, one segment a line; needs --references and --subwords")
    flag("--references", old="--reference", help="raw references, for BLEU; line n belongs to sentence n")
    flag("--subwords", help="what decodes the translations (see xmoe translate); without it nothing is translated")
    flag("--training-log", help="log with log_format json: learning curves and Fig 5")
    more = "further ones, along a training (Fig 5) or of other thresholds (Fig 7)"
    add("--more-checkpoints", nargs="+", default=[], metavar="FILE", help=more)
    parser.old_name("--checkpoints", "--more-checkpoints")
    flag("--model-overrides", default="{}")
    _add_sizes(parser)
    parser.device_flag()
    return parser


def _add_sizes(parser: CommandParser) -> None:
    def add(flag: str, least: int, default: int, text: str) -> None:
        help_text = f"{text} (default {default})"
        parser.add_argument(flag, type=at_least(least), default=default, metavar="N", help=help_text)

    parser.flag("--max-tokens", default=4096)
    add("--sweep-sentences", 1, 1000, "sentences of each point of a sweep")
    add("--translate", 0, 100, "sentences translated at each point of a sweep; 0: none")
    add("--explore", 0, 40, "translated sentences in the explorer; 0: none")
    parser.flag("--beam", default=5, help="beam of these translations")
    parser.numbers_flag("--eval-capacity-factors", old="--capacity-factors", default=list(DEFAULT_CAPACITIES))
    parser.numbers_flag("--thresholds", default=list(DEFAULT_THRESHOLDS))


def _check(args: argparse.Namespace) -> None:
    if args.source and not (args.references and args.subwords):
        raise ValueError("--source needs --references and --subwords: teacher forcing feeds the model both sides")
    files.check_writable(args.out)


@reports_errors("analyse")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    _check(args)
    result = analyse(args)
    # one line, because indented matrices would be ten times as long
    files.write_text(args.out, json.dumps(result, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")
    for problem in result["problems"]:
        print(f"analyse: look at this: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
