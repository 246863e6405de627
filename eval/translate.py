"""Translate raw text with a trained model: one line out for each line in, in the same order.

xmoe translate --checkpoint FILE [FILE ...] --data DIR --source-lang uk --target-lang en \\
    --subwords PATH --input FILE --out FILE

The search is fairseq-generate's with the same options. An empty line gives an empty line. A line longer than
the model's positions (or --max-length) is cut at sentence ends, then commas, then words, translated in
chunks and joined again; standard error tells how many. All input is read before the first batch, and the output
file appears when all is done.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from eval.text import files
from eval.text.translator import Translation, Translator, TranslatorConfig
from xmoe_fairseq.command_line import CommandParser, command_parser, parse_overrides, reports_errors
from xmoe_fairseq.files import keep_inputs

__all__ = ["Translation", "Translator", "TranslatorConfig", "translate_lines"]

_BLOCKS_PER_PROCESS = 8  # lines of a block: few enough to share the load evenly, enough for full batches

# A worker process keeps its Translator here between its calls.
_worker: Translator | None = None
_worker_rank = 0


def translate_lines(
    config: TranslatorConfig, lines: Sequence[str], *, processes: int = 1, progress: bool = False
) -> list[Translation]:
    """Translate with one or several processes, each with a copy of the model and a share of the threads.

    Args:
        config: see `TranslatorConfig`; with several processes and GPUs they take the GPUs in turn.
        lines: raw text.
        processes: 1 works in this process.
        progress: show a tqdm bar on stderr.
    Returns: one translation per line, in order.
    Raises: ValueError and FileNotFoundError as `Translator`.
    """
    if processes < 1:
        raise ValueError(f"processes ({processes}) must be at least 1")
    config.check()
    if processes == 1:
        return Translator(config).translate(lines, progress=progress)
    blocks = _share(lines, processes)
    threads = max(1, torch.get_num_threads() // processes)
    results: list[Translation] = [Translation()] * len(lines)
    # a spawned process inherits no thread pool and no CUDA context
    context = get_context("spawn")
    ranks = context.Queue()
    for rank in range(processes):
        ranks.put(rank)
    with (
        ProcessPoolExecutor(processes, context, _start_worker, (threads, ranks)) as pool,
        tqdm(total=len(lines), unit="line", disable=not progress) as bar,
    ):
        jobs = {
            pool.submit(_work, config, [lines[i] for i in block], [i + 1 for i in block]): block for block in blocks
        }
        try:
            for job in as_completed(jobs):
                for index, translation in zip(jobs[job], job.result(), strict=True):
                    results[index] = translation
                bar.update(len(jobs[job]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _share(lines: Sequence[str], processes: int) -> list[list[int]]:
    """Indices of lines in blocks of similar length; the longest come first, so that no process ends late."""
    order = sorted(range(len(lines)), key=lambda index: -len(lines[index]))
    size = max(1, -(-len(lines) // (processes * _BLOCKS_PER_PROCESS)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _quiet_libraries() -> None:
    """Let only warnings of fairseq and hydra reach standard error, beside the progress bar and our own lines."""
    for name in ("fairseq", "hydra"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _start_worker(threads: int, ranks: Any) -> None:
    global _worker_rank
    _quiet_libraries()
    torch.set_num_threads(threads)
    _worker_rank = ranks.get()


def _work(config: TranslatorConfig, lines: list[str], numbers: list[int]) -> list[Translation]:
    """Translate lines in a worker. Its first call loads the model, so that errors of loading reach the caller."""
    global _worker
    if _worker is None:
        if config.device is None and torch.cuda.is_available():
            config = replace(config, device=f"cuda:{_worker_rank % torch.cuda.device_count()}")
        _worker = Translator(config)
    return _worker.translate(lines, numbers=numbers)


def _report(lines: Sequence[str], translations: Sequence[Translation]) -> None:
    def say(count: int, text: str) -> None:
        if count:
            print(f"translate: {count} of {len(lines)} lines {text}", file=sys.stderr)

    say(sum(t.num_chunks == 0 for t in translations), "are empty and stay empty")
    say(sum(t.num_chunks > 1 for t in translations), "were too long, were cut into chunks and joined")
    say(
        sum(t.truncated for t in translations),
        "reached the longest output allowed; raise --max-len-b or lower --max-length",
    )


def _parser() -> CommandParser:
    parser = command_parser("translate", __doc__)
    flag, add = parser.flag, parser.add_argument
    flag(
        "--checkpoint", old="--path", separator=":", required=True, nargs="+", help="a model; several make an ensemble"
    )
    flag("--user-dir")
    flag("--data", required=True, help="folder of fairseq-preprocess (its dictionaries)")
    flag("--source-lang", required=True)
    flag("--target-lang", required=True)
    flag("--subwords", required=True)
    flag("--input", default="-", help="raw text, one segment a line (default: standard input)")
    flag("--out", old="--output", default="-", help="the translations (default: standard output)")
    flag("--beam", default=5)
    add(
        "--lenpen", type=float, default=1.0, metavar="X", help="length penalty; above 1 favours longer ones (default 1)"
    )
    add("--max-len-a", type=float, default=0.0, help="longest output: a * source length + b (default 0)")
    add("--max-len-b", type=int, default=200, help="see --max-len-a (default 200)")
    flag("--batch-size")
    flag("--max-tokens", help="most source tokens in a batch (default 12000, if no --batch-size)")
    add("--max-length", type=int, metavar="N", help="longest source in subwords (default: the model's positions)")
    choices = ["split", "error"]
    add("--too-long", choices=choices, default="split", help="what to do with longer lines (default split)")
    flag("--model-overrides", default="{}")
    flag("--workers", old="--processes", default=1, help="each loads the model and takes its share")
    parser.device_flag()
    return parser


def _config(args: argparse.Namespace) -> TranslatorConfig:
    return TranslatorConfig(
        paths=args.checkpoint,
        data=args.data,
        source_lang=args.source_lang,
        target_lang=args.target_lang,
        subwords=args.subwords,
        user_dir=args.user_dir,
        beam=args.beam,
        lenpen=args.lenpen,
        max_len_a=args.max_len_a,
        max_len_b=args.max_len_b,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        max_length=args.max_length,
        split_long=args.too_long == "split",
        model_overrides=parse_overrides(args.model_overrides),
        device=args.device,
    )


@reports_errors("translate")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _quiet_libraries()
    config = _config(args)
    config.check()
    keep_inputs(args.out, args.input)
    files.check_writable(args.out)
    lines = files.read_lines(args.input)
    translations = translate_lines(config, lines, processes=args.workers, progress=True)
    files.write_lines(args.out, [translation.text for translation in translations])
    _report(lines, translations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
