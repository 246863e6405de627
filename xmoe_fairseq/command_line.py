"""What every Python command shares: one vocabulary of flags, old names with a warning, errors as one line.

It needs the standard library alone, so that ``--help`` and commands without models start at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

_OLD_UNTIL = "the next release"
_HELP = {
    "--checkpoint": ("FILE", "a trained model, e.g. RUN/checkpoints/averaged.pt"),
    "--checkpoints": ("FILE", "several of them"),
    "--data": ("DIR", "folder of fairseq-preprocess: dictionaries and binary data"),
    "--subwords": ("PATH", "folder of `xmoe prepare subwords learn`, a sentencepiece model, or subword-nmt codes"),
    "--source-lang": ("CODE", "language of the source, as in dict.CODE.txt"),
    "--target-lang": ("CODE", "language of the target"),
    "--pair": ("SRC-TGT", "two language codes, for instance uk-en"),
    "--user-dir": ("DIR", "package with models beyond fairseq's, e.g. xmoe_fairseq"),
    "--device": ("NAME", "cpu, cuda, cuda:N, or auto: the first GPU if there is one"),
    "--input": ("FILE", "what is read"),
    "--out": ("FILE", "what is written; it appears only when complete"),
    "--source": ("FILE", "source text, one segment a line"),
    "--hypotheses": ("FILE", "detokenised translations, one segment a line"),
    "--references": ("FILE", "reference translations, line by line those of the hypotheses"),
    "--thresholds": ("T", "values of moe_threshold, probability masses in [0, 1]"),
    "--eval-capacity-factors": ("X", "values of moe_eval_capacity_factor, > 0, or none for no capacity"),
    "--model-overrides": ("DICT", "model settings to change, e.g. \"{'moe_threshold': 0.7}\""),
    "--gen-subset": ("NAME", "split of the binary data"),
    "--beam": ("N", "hypotheses kept in the search"),
    "--batch-size": ("N", "most sentences in a batch"),
    "--max-tokens": ("N", "most tokens in a batch, padding included"),
    "--workers": ("N", "processes or threads at work"),
    "--seed": ("N", "seed of the random numbers"),
    "--vocab-size": ("N", "entries of the vocabulary"),
    "--num-experts": ("E", "experts of an MoE layer"),
    "--training-log": ("FILE", "what fairseq-train said with log_format json"),
    "--json": (None, "JSON on standard output instead of text"),
}
_Main = TypeVar("_Main", bound=Callable[..., Any])


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer not below ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a whole number, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, got {value}")
        return value

    return parse


_COUNTS = ("--beam", "--batch-size", "--max-tokens", "--workers", "--vocab-size", "--num-experts")
_TYPES: dict[str, Any] = {"--seed": int, **dict.fromkeys(_COUNTS, at_least(1))}


class _OldName(NamedTuple):
    """The new words for an older flag, and the separator of its several values."""

    words: tuple[str, ...]
    separator: str | None


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that knows the shared flags by name and takes older names, with a warning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.old_names: dict[str, _OldName] = {}

    def flag(self, name: str, *, old: str | None = None, separator: str | None = None, **options: Any) -> None:
        """Add a flag of the vocabulary.

        Args:
            name: a key of the vocabulary; it gives metavar, help and type, unless ``options`` do.
            old: its name in the last release, taken with a warning.
            separator: the character between several values of the old flag, which are several words now.
            options: of ``add_argument``. A default is added to the help.
        """
        metavar, text = _HELP[name]
        if name in _TYPES:
            options.setdefault("type", _TYPES[name])
        if metavar is None:
            options.setdefault("action", "store_true")
        else:
            options.setdefault("metavar", metavar)
        help_text = options.pop("help", text)
        default = options.get("default")
        if isinstance(default, list):
            default = " ".join("none" if value is None else f"{value:g}" for value in default)
        if default not in (None, "") and not isinstance(default, bool) and "default" not in help_text:
            help_text += f" (default {str(default).replace('%', '%%')})"
        self.add_argument(name, help=help_text, **options)
        if old is not None:
            self.old_name(old, name, separator=separator)

    def old_name(self, old: str, *words: str, separator: str | None = None) -> None:
        """Take ``old`` for ``words``, with a warning."""
        self.old_names[old] = _OldName(words, separator)

    def device_flag(self, **options: Any) -> None:
        """Add ``--device``, whose value is None for auto, and the older ``--cpu``."""
        self.flag("--device", type=_device, **{"default": "auto", **options})
        self.old_name("--cpu", "--device", "cpu")

    def numbers_flag(self, name: str, **options: Any) -> None:
        """Add a flag of several numbers; ``none`` among capacities is None."""
        check = _threshold if name == "--thresholds" else _factor_or_none
        self.flag(name, nargs="+", action=functools.partial(_Numbers, check=check), type=str, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if _parser_is_wanted.get():
            raise _Complete(self)
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._with_new_names(given), namespace)

    def _with_new_names(self, given: Sequence[str]) -> list[str]:
        words: list[str] = []
        separator = None
        for position, word in enumerate(given):
            if word == "--":
                return [*words, *given[position:]]
            name, equals, value = word.partition("=")
            if name in self.old_names:
                new = self.old_names[name]
                self.warn(f"{name} is now {' '.join(new.words)}; the old name goes in {_OLD_UNTIL}")
                words += new.words
                separator = new.separator
                if not equals:
                    continue
                word = value
            words += word.split(separator) if separator else [word]
            separator = None
        return words

    def warn(self, text: str) -> None:
        """Print one line on standard error."""
        print(f"{self.prog}: warning: {text}", file=sys.stderr)


class _Complete(Exception):
    """No error: it carries a parser out of a ``main`` to `parser_of`."""

    def __init__(self, parser: CommandParser) -> None:
        super().__init__()
        self.parser = parser


_parser_is_wanted: ContextVar[bool] = ContextVar("parser_is_wanted", default=False)


def parser_of(main: Callable[..., Any]) -> CommandParser:
    """The complete parser of a command, taken from its ``main``, which runs up to the point where it would parse."""
    token = _parser_is_wanted.set(True)
    try:
        main([])
    except _Complete as complete:
        return complete.parser
    finally:
        _parser_is_wanted.reset(token)
    raise TypeError(f"{main.__module__}.{main.__qualname__} parses no arguments by a CommandParser")


class _Numbers(argparse.Action):
    """Reads several numbers, one a word; one word with commas is the older form."""

    def __init__(self, *args: Any, check: Callable[[str], float | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check = check

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if any("," in value for value in values):
            shown = " ".join(",".join(values).split(","))
            parser.warn(f"{option_string} takes words: {option_string} {shown}; commas go in {_OLD_UNTIL}")
        words = [word for value in values for word in value.split(",") if word]
        try:
            setattr(namespace, self.dest, [self.check(word) for word in words])
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def _threshold(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{text} must be a probability mass in [0, 1]")
    return value


def _factor_or_none(text: str) -> float | None:
    value = None if text == "none" else float(text)
    if value is not None and not value > 0:
        raise ValueError(f"{text} must be > 0, or none; 1 is an even share per expert")
    return value


def _device(text: str) -> str | None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"wants cpu, cuda, cuda:N or auto, got {text!r}")
    return None if text == "auto" else text


def command_parser(name: str, text: str | None, **options: Any) -> CommandParser:
    """The parser of ``xmoe NAME``; ``text`` is the module's docstring: a first line, and what --help tells below."""
    first, _, rest = (text or "").partition("\n")
    settings: dict[str, Any] = {"prog": f"xmoe {name}", "formatter_class": argparse.RawDescriptionHelpFormatter}
    return CommandParser(description=textwrap.fill(first, 118), epilog=rest.strip("\n"), **settings | options)


def parse_overrides(text: str) -> dict[str, Any]:
    """Read fairseq's ``--model-overrides``, a Python dictionary. Raises: ValueError if it is none."""
    import ast

    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        overrides = None
    if not isinstance(overrides, dict):
        raise ValueError(f"--model-overrides {text!r}: expected a dictionary such as \"{{'moe_threshold': 0.7}}\"")
    return overrides


def reports_errors(name: str) -> Callable[[_Main], Callable[..., int]]:
    """Decorate a ``main``: an error that a user can mend becomes one line on standard error and exit code 1."""

    def decorate(main: _Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            try:
                try:
                    return main(argv) or 0
                finally:
                    sys.stdout.flush()  # at the end of the interpreter, a failure to flush would be a traceback
            except BrokenPipeError:  # the reader (head, less) closed the pipe
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except OSError as error:
                told = f"{error.filename or 'file system'}: {error.strerror}" if error.strerror else error
                print(f"{name}: error: {told}", file=sys.stderr)
            except ValueError as error:
                print(f"{name}: error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(f"{name}: interrupted; no result was written", file=sys.stderr)
                return 130
            return 1

        return run

    return decorate
