"""Subword models: learn them, encode and decode streams with them, write fairseq dictionaries.

A folder of subwords holds ``subwords.json`` (the settings) and, for each of ``joint`` or the two languages,
a model (``NAME.model`` of sentencepiece, ``NAME.codes`` of subword-nmt) and a fairseq dictionary
(``dict.txt`` of joint subwords, ``dict.LANGUAGE.txt`` of separate ones).

- White space: every run of Unicode white space is one space before learning and encoding, because fairseq
  splits its input at any of them. One line in is one line out, an empty one too.
- Round trip: decode(encode(x)) is x as the model normalises it (nmt_nfkc by default: compatibility forms
  such as a raised 2 or a full-width comma become plain ones; ``--normalization identity`` leaves them).
  Characters the model never saw become <unk> in fairseq, unless it was learned with ``--byte-fallback``.
- subword-nmt works on words between spaces, so it suits spaced languages; a word that itself ends in @@ is
  not restored.
"""

import argparse
import collections
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import sentencepiece
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from data_prep.textio import DataError, language_pair, read_lines, require_file
from xmoe_fairseq.command_line import CommandParser, at_least, command_parser, reports_errors
from xmoe_fairseq.files import open_aside

SETTINGS = "subwords.json"
BATCH_LINES = 10_000
FAIRSEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
# Only the order matters to fairseq, and --srcdict takes the order of the file; its own recipes write 100 too.
COUNT = 100
MAX_LINE_BYTES = 16_384  # sentencepiece leaves longer lines out when learning


@dataclass(frozen=True)
class Settings:
    """How a folder of subwords was learned.

    Attributes:
        tool: ``sentencepiece`` or ``subword-nmt``.
        vocab_size: of each model, with sentencepiece's own <unk>, <s>, </s>.
        max_lines: lines used of each file, evenly spaced over it; 0 = all.
        character_coverage: share of the characters seen that get a piece; None = 0.9995 for zh, ja, else 1.
    """

    source: str
    target: str
    tool: str = "sentencepiece"
    joint: bool = True
    vocab_size: int = 32_000
    max_lines: int = 2_000_000
    character_coverage: float | None = None
    byte_fallback: bool = False
    split_digits: bool = False
    normalization: str = "nmt_nfkc"

    def name_for(self, language: str | None) -> str:
        """The model's name for a language; joint subwords need none. Raises: DataError if it is not known."""
        allowed = (self.source, self.target, *([None] if self.joint else []))
        if language not in allowed:
            raise DataError(f"--language {language}: these subwords want {self.source} or {self.target}")
        return "joint" if self.joint or language is None else language

    def names(self) -> dict[str, list[str]]:
        """Languages by the model they share."""
        both = [self.source, self.target]
        return {"joint": both} if self.joint else {language: [language] for language in both}


def dictionary_name(name: str) -> str:
    return "dict.txt" if name == "joint" else f"dict.{name}.txt"


def load_settings(folder: Path) -> Settings:
    path = folder / SETTINGS
    if not path.is_file():
        raise DataError(f"{path}: no such file; learn subwords first: xmoe prepare subwords learn --out {folder}")
    return Settings(**json.loads(path.read_text(encoding="utf-8")))


def tidy(raw: bytes) -> str:
    return " ".join(raw.decode().split())


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def sampled_lines(path: Path, max_lines: int) -> Iterator[str]:
    """All lines, or ``max_lines`` of them evenly spaced: no random numbers, the same on every machine."""
    total = count_lines(path) if max_lines else 0
    with path.open("rb") as file:
        for number, raw in enumerate(read_lines(file)):
            if total > max_lines and number * max_lines // total == (number - 1) * max_lines // total:
                continue
            try:
                yield tidy(raw)
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number + 1}: not valid UTF-8; run python -m data_prep.validate") from None


def learn_sentencepiece(lines: Iterator[str], languages: Sequence[str], settings: Settings) -> bytes:
    """Learn a BPE model; equal bytes for equal text and settings. Returns: the serialised model.

    num_threads stays at sentencepiece's default: the model file notes it, another number gives other bytes.
    """
    coverage = settings.character_coverage
    if coverage is None:
        coverage = 0.9995 if {"zh", "ja"} & set(languages) else 1.0
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=coverage,
            byte_fallback=settings.byte_fallback,
            split_digits=settings.split_digits,
            normalization_rule_name=settings.normalization,
            max_sentence_length=MAX_LINE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(vocabulary_problem(settings.vocab_size, languages, str(error))) from None
    return model.getvalue()


def vocabulary_problem(size: int, languages: Sequence[str], message: str) -> str:
    """Say what sentencepiece's failed check means."""
    where = f"--vocab-size {size} for {'+'.join(languages)}"
    if match := re.search(r"set it to a value <= (\d+)", message):
        return f"{where}: the text yields at most {match[1]}; give {match[1]} or less, or more text"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        way_out = f"give more than {match[1]}, or lower --character-coverage"
        return f"{where}: the characters alone need {match[1]}; {way_out}"
    return f"{where}: sentencepiece failed: {message}"


def learn_subword_nmt(lines: Iterator[str], languages: Sequence[str], settings: Settings) -> tuple[bytes, bytes]:
    """Learn merges on whole words. Returns: the codes file and the fairseq dictionary (real counts)."""
    words = collections.Counter(word for line in lines for word in line.split(" ") if word)
    characters = len({c for word in words for c in word[:-1]}) + len({word[-1] for word in words})
    merges = settings.vocab_size - characters
    where = f"--vocab-size {settings.vocab_size} for {'+'.join(languages)}"
    if merges < 1:
        raise DataError(f"{where}: the characters alone need {characters}; give more than {characters}")
    vocabulary = io.StringIO("".join(f"{word} {count}\n" for word, count in sorted(words.items())))
    codes = io.StringIO()
    learn_bpe(vocabulary, codes, merges, is_dict=True)
    learned = codes.getvalue().count("\n") - 1  # the first line is the version
    if learned < merges:
        most = characters + learned
        raise DataError(f"{where}: the text yields at most {most}; give {most} or less, or more text")
    codes.seek(0)
    bpe, tokens = BPE(codes), collections.Counter[str]()
    for word, count in words.items():
        for token in bpe.segment_tokens([word]):
            tokens[token] += count
    ranked = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
    return codes.getvalue().encode(), dictionary_text(ranked).encode()


def dictionary_text(tokens: Sequence[tuple[str, int]]) -> str:
    """fairseq's dictionary format. A token that looks like one of fairseq's own gets another index."""
    mark = dict.fromkeys(FAIRSEQ_SPECIALS, " #fairseq:overwrite")
    return "".join(f"{token} {count}{mark.get(token, '')}\n" for token, count in tokens)


def sentencepiece_dictionary(model: bytes) -> bytes:
    """All pieces that encoding can yield, in the model's order; fairseq adds its special ones itself."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [i for i in range(len(processor)) if not processor.is_control(i) and not processor.is_unknown(i)]
    return dictionary_text([(processor.id_to_piece(i), COUNT) for i in ids]).encode()


def learn(inputs: Sequence[Path], folder: Path, settings: Settings) -> list[Path]:
    """Learn and write models, dictionaries and settings: all, or nothing on failure.

    Args:
        inputs: training text of the source and of the target language.
    Raises: DataError for missing text, or a vocabulary size the text cannot fill (it gives the largest).
    """
    results: dict[Path, bytes] = {}
    texts = dict(zip((settings.source, settings.target), inputs, strict=True))
    for path in inputs:
        require_file(path, "training text")
    for name, languages in settings.names().items():
        lines = itertools.chain.from_iterable(sampled_lines(texts[code], settings.max_lines) for code in languages)
        if settings.tool == "sentencepiece":
            model = learn_sentencepiece(lines, languages, settings)
            results[folder / f"{name}.model"] = model
            results[folder / dictionary_name(name)] = sentencepiece_dictionary(model)
        else:
            codes, dictionary = learn_subword_nmt(lines, languages, settings)
            results[folder / f"{name}.codes"] = codes
            results[folder / dictionary_name(name)] = dictionary
    results[folder / SETTINGS] = (json.dumps(asdict(settings), indent=2) + "\n").encode()
    with open_aside(list(results)) as files:
        for file, content in zip(files, results.values(), strict=True):
            file.write(content)
    return list(results)


class Coder:
    """Encodes and decodes lines of one language (of either one, if the subwords are joint).

    Args:
        folder: made by ``learn``.
        threads: of sentencepiece; subword-nmt uses one.
    Raises: DataError if the folder has no subwords for the language.
    """

    def __init__(self, folder: Path, language: str | None = None, *, threads: int = 1) -> None:
        settings = load_settings(folder)
        name, self._threads = settings.name_for(language), threads
        self._bpe: BPE | None = None
        if settings.tool == "subword-nmt":
            codes = require_file(folder / f"{name}.codes", "subword-nmt codes")
            self._bpe = BPE(io.StringIO(codes.read_text(encoding="utf-8")))
            return
        model = require_file(folder / f"{name}.model", "sentencepiece model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except RuntimeError:
            raise DataError(f"{model}: no sentencepiece model, or a damaged one; learn it again") from None

    def encode(self, lines: Sequence[str]) -> list[str]:
        """Subwords of each line, one space between them."""
        if self._bpe is not None:
            return [" ".join(self._bpe.segment_tokens(line.split())) for line in lines]
        tidied = [" ".join(line.split()) for line in lines]
        pieces = self._processor.encode(tidied, out_type=str, num_threads=self._threads)
        return [" ".join(line) for line in pieces]

    def decode(self, lines: Sequence[str]) -> list[str]:
        """Plain text of each line of subwords."""
        if self._bpe is not None:
            return [(line + " ").replace("@@ ", "").strip() for line in lines]
        texts: list[str] = self._processor.decode([line.split() for line in lines], num_threads=self._threads)
        return texts


def transform(code: Callable[[Sequence[str]], list[str]], source: BinaryIO, sink: BinaryIO, name: str) -> int:
    """Stream lines through ``code``, BATCH_LINES at a time. Returns: lines written, equal to lines read."""
    done, lines = 0, read_lines(source)
    while batch := list(itertools.islice(lines, BATCH_LINES)):
        try:
            texts = [raw.decode() for raw in batch]
        except UnicodeDecodeError:
            raise DataError(f"{name}: invalid UTF-8 after line {done}; run python -m data_prep.validate") from None
        sink.write("".join(f"{line}\n" for line in code(texts)).encode())
        done += len(batch)
    sink.flush()
    return done


class Cutter:
    """Encodes as ``code`` does and keeps the first ``max_length`` subwords of a line; counts lines and cuts."""

    def __init__(self, code: Callable[[Sequence[str]], list[str]], max_length: int) -> None:
        self._code, self.max_length = code, max_length
        self.lines = self.longest = self.cut = 0

    def __call__(self, lines: Sequence[str]) -> list[str]:
        encoded = [line.split(" ") for line in self._code(lines)]
        self.lines += len(encoded)
        self.longest = max([self.longest, *map(len, encoded)])
        self.cut += sum(len(pieces) > self.max_length for pieces in encoded)
        return [" ".join(pieces[: self.max_length]) for pieces in encoded]

    def report(self) -> dict[str, int]:
        """What it did, in subwords."""
        return {"lines": self.lines, "longest": self.longest, "max_length": self.max_length, "cut": self.cut}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("prepare subwords", f"{__doc__.splitlines()[0]} Exit: 0 done, 1 failed, 2 bad arguments.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_learn(commands.add_parser("learn", help="learn a model and its dictionary from the training text"))
    for command, what in (("encode", "raw text to subwords"), ("decode", "subwords to raw text")):
        sub = commands.add_parser(command, help=f"{what}, line by line")
        _add_model(sub)
        sub.flag("--input", type=Path, help="default: standard input")
        sub.flag("--workers", old="--threads", type=at_least(1), default=1, help="threads")
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
    files = ("PREFIX.SRC", "PREFIX.TGT")
    input_help = "training text; the names end in the language codes, such as train.uk train.en"
    add("--inputs", type=Path, nargs=2, required=True, metavar=files, help=input_help)
    flag("--out", type=Path, required=True, metavar="DIR", help="folder for model, dictionary and settings")
    add(
        "--tool",
        choices=("sentencepiece", "subword-nmt"),
        default="sentencepiece",
        help="default sentencepiece",
    )
    flag("--vocab-size", type=at_least(1), default=32_000, help="of each model")
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
    source, target = (path.suffix.lstrip(".") for path in args.inputs)
    try:
        language_pair(f"{source}-{target}")
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
    """encode or decode."""
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
