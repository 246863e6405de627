"""One vocabulary of flags over all Python commands, and older names with a warning."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xmoe_fairseq import cli, completion
from xmoe_fairseq.command_line import _HELP, command_parser, parser_of, reports_errors

ROOT = Path(__file__).parents[1]


def parser_with(*flags, **options):
    parser = command_parser("trial", "One line.\nMore of it.")
    for name in flags:
        parser.flag(name, **options)
    return parser


def test_an_older_name_gives_the_same_with_a_warning(capsys):
    parser = parser_with("--out", old="--output", required=True)
    assert parser.parse_args(["--output", "x"]) == parser.parse_args(["--out", "x"])
    assert parser.parse_args(["--output=x"]).out == "x"
    assert capsys.readouterr().err.splitlines() == ["xmoe trial: warning: --output is now --out; the old name goes in"
                                                    " the next release"] * 2  # fmt: skip


def test_an_older_form_of_several_values_becomes_words(capsys):
    parser = parser_with("--checkpoint", old="--path", separator=":", nargs="+")
    parser.numbers_flag("--thresholds", default=[0.9])
    parser.numbers_flag("--eval-capacity-factors", default=[])
    args = parser.parse_args(["--path", "a.pt:b.pt", "--thresholds", "0,0.5,1", "--eval-capacity-factors", "none", "2"])
    assert args.checkpoint == ["a.pt", "b.pt"]
    assert args.thresholds == [0.0, 0.5, 1.0]
    assert args.eval_capacity_factors == [None, 2.0]
    assert "--thresholds takes words: --thresholds 0 0.5 1" in capsys.readouterr().err
    assert parser.parse_args(["--checkpoint", "a:b"]).checkpoint == ["a:b"]
    assert parser.parse_args(["--checkpoint", "a"]).thresholds == [0.9]


def test_what_follows_a_double_dash_is_left_alone():
    parser = parser_with("--out", old="--output")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--output"]).words == ["--output"]


@pytest.mark.parametrize(
    ("words", "device"),
    [([], None), (["--device", "auto"], None), (["--cpu"], "cpu"), (["--device", "cuda:1"], "cuda:1")],
)
def test_device_has_one_form(words, device):
    parser = command_parser("trial", "")
    parser.device_flag()
    assert parser.parse_args(words).device == device


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "gpu"], "wants cpu, cuda, cuda:N or auto, got 'gpu'"),
        (["--thresholds", "1.5"], "1.5 must be a probability mass in [0, 1]"),
        (["--eval-capacity-factors", "0"], "0 must be > 0, or none"),
    ],
)
def test_a_bad_value_is_a_bad_argument(words, message, capsys):
    parser = command_parser("trial", "")
    parser.device_flag()
    parser.numbers_flag("--thresholds")
    parser.numbers_flag("--eval-capacity-factors")
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("t is 2; it must be in [0, 1]"), 1, "trial: error: t is 2; it must be in [0, 1]"),
        (FileNotFoundError("no such file: x"), 1, "trial: error: no such file: x"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "trial: error: x: No such file or directory"),
        (OSError(28, "No space left on device"), 1, "trial: error: file system: No space left on device"),
        (KeyboardInterrupt(), 130, "trial: interrupted; no result was written"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_an_exit_code(error, code, line, capsys):
    @reports_errors("trial")
    def main(argv=None):
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_slip_of_ours_is_not_hidden():
    @reports_errors("trial")
    def main(argv=None):
        raise KeyError("x")

    with pytest.raises(KeyError):
        main([])


def parsers_of_all_commands():
    """(command, parser, its flags, older names it takes) of every Python command and of its own sub-commands."""
    for command in cli.COMMANDS.values():
        if command.target.endswith(".sh") or command.target == completion.WITHOUT_FLAGS:
            continue
        parsers = [parser_of(importlib.import_module(command.target).main)]
        for action in parsers[0]._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        for parser in parsers:
            flags = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
            yield command, parser, flags, parser.old_names


def test_every_command_speaks_the_vocabulary():
    """A name that one command retired is no other's, and every flag of the vocabulary takes as many words."""
    retired, used = {}, {}
    for command, parser, flags, old in parsers_of_all_commands():
        assert parser.prog.startswith(f"xmoe {command.name}"), f"{command.target}: --help says {parser.prog}"
        retired |= dict.fromkeys(old, command.name)
        for name in flags:
            used.setdefault(name, []).append(command.name)
        for new in old.values():
            assert new.words[0] in flags, f"{command.name}: {new.words[0]}"
    # where these are retired they meant another thing, or several of what the vocabulary calls so
    meant_otherwise = {"--checkpoints", "--input", "--inputs", "--json", "--threshold", "--beam", "--batch-size"}
    clashes = {name: (retired[name], used[name]) for name in retired if name in used and name not in meant_otherwise}
    assert not clashes
    assert {"--checkpoint", "--data", "--out", "--device", "--thresholds", "--target-lang"} <= set(used)


def test_the_docs_list_the_vocabulary():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \| (.+?) \|$", text, flags=re.MULTILINE))
    assert {name: help_text for name, (_, help_text) in _HELP.items()} == listed


@pytest.mark.parametrize("ends", ["print('text')", "command_parser('x', 'Help.').parse_args(['--help'])"])
def test_a_reader_that_goes_away_gets_no_traceback(ends):
    """As in ``xmoe score ... | head -1``: what is still buffered cannot be written."""
    lines = ["from xmoe_fairseq.command_line import *", "import sys", "@reports_errors('x')", "def main(argv=None):"]
    script = "\n".join([*lines, f"    {ends}", "sys.exit(main())"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 1)
