"""Learn subwords, encode and decode streams with them, and print their fairseq dictionaries."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from data_prep.subword_coding import Coder, Cutter, transform
from data_prep.subword_models import Settings, dictionary_name, learn, load_settings
from data_prep.textio import DataError, language_code, language_pair, require_file
from xmoe_fairseq.command_line import CommandParser, at_least, command_parser, reports_errors
from xmoe_fairseq.files import keep_inputs, open_aside


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("prepare subwords", f"{__doc__.splitlines()[0]} Exit: 0 done, 1 failed, 2 bad arguments.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_learn(commands.add_parser("learn", help="learn a model and its dictionary from the training text"))
    for command, what in (("encode", "raw text to subwords"), ("decode", "subwords to raw text")):
        sub = commands.add_parser(command, help=f"{what}, line by line")
        _add_model(sub)
        sub.flag("--input", type=Path, help="default: standard input")
        sub.flag("--workers", old="--threads", default=1, help="threads")
        sub.set_defaults(max_length=None, report=None)
        if command == "encode":
            cut_help = "keep the first N subwords of a line, for lines that no model takes"
            sub.add_argument("--max-length", type=at_least(1), metavar="N", help=cut_help)
            sub.add_argument("--report", type=Path, metavar="FILE", help="with --max-length: lines and cuts, as JSON")
    _add_model(commands.add_parser("dict", help="write the dictionary for fairseq-preprocess --srcdict and --tgtdict"))
    return parser.parse_args(argv)


def _add_model(parser: CommandParser) -> None:
    parser.flag("--subwords", old="--model", type=Path, required=True, metavar="DIR", help="folder made by learn")
    parser.add_argument("--language", metavar="CODE", help="language of the text; joint subwords need none")
    parser.flag("--out", old="--output", type=Path, help="default: standard output")


def _add_learn(parser: CommandParser) -> None:
    def coverage(text: str) -> float:
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", text) or not 0.9 <= float(text) <= 1.0:
            raise argparse.ArgumentTypeError(f"must be from 0.9 to 1, got {text!r}")
        return float(text)

    flag, add = parser.flag, parser.add_argument
    input_help = "training text, of two languages or of one; the names end in the codes, such as train.uk train.en"
    add("--inputs", type=Path, nargs="+", required=True, metavar="PREFIX.LANGUAGE", help=input_help)
    flag("--out", type=Path, required=True, metavar="DIR", help="folder for model, dictionary and settings")
    add(
        "--tool",
        choices=("sentencepiece", "subword-nmt"),
        default="sentencepiece",
        help="default sentencepiece",
    )
    flag("--vocab-size", default=32_000, help="of each model")
    add("--separate", action="store_true", help="a model for each language instead of a joint one")
    add(
        "--max-lines",
        type=at_least(0),
        default=2_000_000,
        help="evenly spaced lines of a file; 0 = all (default 2M)",
    )
    add("--character-coverage", type=coverage, help="default 0.9995 with zh or ja, else 1 (sentencepiece)")
    add("--byte-fallback", action="store_true", help="unseen characters become bytes (sentencepiece)")
    add("--split-digits", action="store_true", help="each digit is a piece (sentencepiece)")
    rules = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
    add(
        "--normalization",
        choices=rules,
        default="nmt_nfkc",
        help="default nmt_nfkc; *_cf lower-cases (sentencepiece)",
    )


def settings_of(args: argparse.Namespace) -> Settings:
    languages = [path.suffix.lstrip(".") for path in args.inputs]
    try:
        source, target = language_pair("-".join(languages)) if len(languages) > 1 else (language_code(*languages), None)
    except argparse.ArgumentTypeError as error:
        raise DataError(f"--inputs: the ends of the file names tell the languages: {error}") from None
    settings = Settings(
        source=source,
        target=target,
        tool=args.tool,
        joint=not args.separate,
        vocab_size=args.vocab_size,
        max_lines=args.max_lines,
        character_coverage=args.character_coverage,
        byte_fallback=args.byte_fallback,
        split_digits=args.split_digits,
        normalization=args.normalization,
    )
    defaults = Settings(settings.source, settings.target)
    for field in ("character_coverage", "byte_fallback", "split_digits", "normalization"):
        if settings.tool == "subword-nmt" and getattr(settings, field) != getattr(defaults, field):
            flag = "--" + field.replace("_", "-")
            raise DataError(f"{flag}: subword-nmt has no such setting; leave it out or use --tool sentencepiece")
    return settings


def run_code(args: argparse.Namespace) -> int:
    """Run ``encode`` or ``decode``."""
    if args.out is not None and args.input is not None:
        keep_inputs(args.out, args.input)
    coder = Coder(args.subwords, args.language, threads=args.workers)
    code = coder.encode if args.command == "encode" else coder.decode
    cutter = Cutter(code, args.max_length) if args.max_length else None
    with ExitStack() as stack:
        source, name = sys.stdin.buffer, "standard input"
        if args.input is not None:
            source, name = stack.enter_context(require_file(args.input, "input").open("rb")), str(args.input)
        sink = sys.stdout.buffer
        if args.out is not None:
            (sink,) = stack.enter_context(open_aside([args.out]))
        transform(cutter or code, source, sink, name)
        if cutter and args.report:
            (report,) = stack.enter_context(open_aside([args.report]))
            report.write((json.dumps(cutter.report(), indent=2) + "\n").encode())
    if cutter and cutter.cut:
        print(
            f"subwords: {cutter.cut} of {cutter.lines} lines cut to {cutter.max_length} subwords: {name}",
            file=sys.stderr,
        )
    return 0


def run_dict(args: argparse.Namespace) -> int:
    name = load_settings(args.subwords).name_for(args.language)
    content = require_file(args.subwords / dictionary_name(name), "dictionary").read_bytes()
    if args.out is None:
        sys.stdout.buffer.write(content)
        return 0
    with open_aside([args.out]) as (file,):
        file.write(content)
    return 0


@reports_errors("subwords")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.command == "learn":
        for path in learn(args.inputs, args.out, settings_of(args)):
            print(path)
        return 0
    return run_code(args) if args.command in ("encode", "decode") else run_dict(args)


if __name__ == "__main__":
    sys.exit(main())
