"""Print a script that completes the commands of ``xmoe`` and their flags in bash or zsh.

    xmoe completion bash > ~/.local/share/bash-completion/completions/xmoe

The library shtab makes the script from the parsers of all Python commands, which takes some seconds since they are
imported for it, and from the usage texts of the shell scripts. Completing a word then starts no Python.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from . import cli
from .command_line import CommandParser, command_parser, parser_of, reports_errors

SHELLS = ("bash", "zsh")
WITHOUT_FLAGS = "xmoe_fairseq.moe.native.build"  # the layer uses nothing of the package around it, nor its parser
_FOLDERS = ("DIR",)
_FILES = ("FILE", "PATH", "PREFIX", "YAML", "JSON", "TSV", "MANIFEST")


def script(shell: str, commands: Sequence[cli.Command]) -> str:
    """The completion script for ``commands``."""
    import shtab

    logging.getLogger("shtab").setLevel(logging.WARNING)  # an imported command may have asked for debug messages
    return str(shtab.complete(command_tree(commands), shell))


def command_tree(commands: Sequence[cli.Command]) -> argparse.ArgumentParser:
    """One parser of ``xmoe`` with a sub-parser for each command, and one for each family such as ``checkpoint``."""
    tree = argparse.ArgumentParser(prog="xmoe")
    tree.add_argument("--version", action="store_true", help="print the version")
    names = tree.add_subparsers()
    families = {}
    for command in commands:
        family, _, name = command.name.rpartition(" ")
        if family and family not in families:
            families[family] = names.add_parser(family, help=f"commands of {family}").add_subparsers()
        parent = _flags_of(command)
        (families[family] if family else names).add_parser(name, help=command.does, parents=[parent], add_help=False)
    return tree


def _flags_of(command: cli.Command) -> argparse.ArgumentParser:
    """A parser with the flags of ``command``; with none where its module or script is not installed."""
    parser = argparse.ArgumentParser()
    if command.target.endswith(".sh"):
        parser = _parser_of_script(command)
    elif command.target != WITHOUT_FLAGS and _is_usable(command):
        parser = parser_of(importlib.import_module(command.target).main)
    _complete_paths(parser)
    return parser


def _is_usable(command: cli.Command) -> bool:
    try:
        cli.command_line(command, [])
    except FileNotFoundError:
        return False
    return True


def _parser_of_script(command: cli.Command) -> argparse.ArgumentParser:
    path = cli.CHECKOUT / command.target
    parser = argparse.ArgumentParser()
    if path.is_file():
        usage = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, check=True).stdout
        for flag, metavar in flags_of_usage(usage):
            parser.add_argument(flag, **({"metavar": metavar} if metavar else {"action": "store_true"}))
    return parser


def flags_of_usage(usage: str) -> Iterator[tuple[str, str]]:
    """Flags of a script's usage text with the names of their values, "" for a switch.

    They stand in its first lines, and in lines that begin with a flag, before the two spaces that part them from text.
    """
    synopsis, _, rest = usage.partition("\n\n")
    described = re.findall(r"^ {2}((?:-\w, )?--.*?)(?: {2,}.*)?$", rest, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for text in (synopsis, *described):
        for flag, metavar in re.findall(r"(--[a-z][a-z-]*)(?: ([A-Z][\w.|-]*))?", text):
            found[flag] = found.get(flag) or metavar.partition(".")[0].partition("|")[0]
    found.pop("--help", None)
    yield from found.items()


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let values whose metavar is a file or a folder be completed as such."""
    import shtab

    for action in parser._actions:
        metavar = action.metavar[0] if isinstance(action.metavar, tuple) else action.metavar
        kind = (metavar or "").partition(".")[0]
        if kind in (*_FOLDERS, *_FILES):
            action.complete = shtab.DIRECTORY if kind in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_paths(sub)


def _parser() -> CommandParser:
    parser = command_parser("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read the script")
    return parser


@reports_errors("completion")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if find_spec("shtab") is None:
        raise ValueError("needs shtab, which is not installed here; pip install 'xmoe-fairseq[completion]'")
    print(script(args.shell, list(cli.COMMANDS.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
