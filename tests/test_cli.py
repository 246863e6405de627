"""The command xmoe: its table, its help, its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from xmoe_fairseq import __version__, cli

ROOT = Path(__file__).parents[1]


def test_every_name_leads_somewhere():
    for command in cli.COMMANDS.values():
        if command.target.endswith(".sh"):
            assert (ROOT / command.target).is_file(), command
        else:
            path = ROOT / f"{command.target.replace('.', '/')}.py"
            assert path.is_file(), command
            assert '__name__ == "__main__"' in path.read_text(), command


def test_everything_that_can_be_started_has_a_name():
    """A module with a command line, or a script with a usage text, is found by xmoe --help."""
    # steps of scripts, as all of eval/run is
    inner = {
        "eval.run_report",
        "eval.lm_report",
        "eval.study",
        "benchmarks.hf_peers",
        "data_prep.mtdata_index",
        "benchmarks.ctranslate2_model",
    }
    targets = {command.target for command in cli.COMMANDS.values()} | inner
    for folder in ("data_prep", "eval", "benchmarks", "xmoe_fairseq"):
        for path in (ROOT / folder).rglob("*.py"):
            if '__name__ == "__main__"' in path.read_text() and path.name != "cli.py":
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                assert module in targets or module.startswith("eval.run.")
    for folder in ("data_prep", "eval", "benchmarks", "scripts"):
        for path in (ROOT / folder).glob("*.sh"):
            if "\nusage()" in path.read_text() and path.name != "serve.sh":  # xmoe serve is the module itself
                assert str(path.relative_to(ROOT)) in targets


def test_help_is_grouped_and_imports_neither_torch_nor_fairseq():
    code = (
        "import sys; from xmoe_fairseq.cli import main; code = main(['--help']);"
        "sys.exit(code or ('torch' in sys.modules) or ('fairseq' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for title, commands in cli.GROUPS.items():
        assert title in lines
        for command in commands:
            assert any(line.split()[: len(command.name.split())] == command.name.split() for line in lines)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "usage: xmoe COMMAND"),
        (["--version"], 0, f"xmoe {__version__}"),
        (["checkpoint"], 2, "checkpoint average"),
        (["checkpoint", "--help"], 0, "checkpoint average"),
        (["transalte"], 2, "no command 'transalte'; did you mean translate"),
        (["checkpoint", "averaeg"], 2, "did you mean checkpoint average"),
    ],
)
def test_what_is_not_a_command(arguments, code, text, capsys):
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert text in (err if code else out)


def test_a_command_runs_in_the_callers_folder_with_its_arguments_and_exit_code(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "xmoe_fairseq.cli"]

    def run(*arguments):
        return subprocess.run(
            [*start, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )

    (tmp_path / "a.en").write_text("one\n")
    (tmp_path / "a.uk").write_text("один\nдва\n")
    result = run("prepare", "validate", "--pair", "uk-en", "a")
    assert result.returncode == 1
    assert "a.uk" in result.stdout + result.stderr
    if sys.version_info >= (3, 11):
        (tmp_path / "data_prep.py").write_text("raise RuntimeError('the file in the folder')\n")
        assert run("prepare", "validate", "--pair", "uk-en", "a").stderr == result.stderr
    result = run("demo", "--method", "nothing")  # a script
    assert result.returncode == 2
    assert "--method is one of" in result.stderr


def test_without_the_checkout_a_command_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert cli.main(["translate", "--help"]) == 1
    error = capsys.readouterr().err
    assert "xmoe translate needs the module eval.translate" in error
    assert "clone the repository" in error
    inspect = cli.COMMANDS["checkpoint inspect"]
    assert cli.command_line(inspect, ["x.pt"])[1:] == ["-m", "xmoe_fairseq.checkpoints.inspect", "x.pt"]


def test_the_package_declares_what_it_imports():
    """Third-party modules that xmoe_fairseq.moe imports are in the wheel's dependencies; the kernels' in an extra."""
    text = (ROOT / "pyproject.toml").read_text()
    needed = text.split("dependencies = [", 1)[1].split("]", 1)[0]
    of_kernels = needed + text.split("\ntriton = [", 1)[1].split("]", 1)[0]
    for path in (ROOT / "xmoe_fairseq" / "moe").rglob("*.py"):
        declared = of_kernels if path.parent.name == "kernels" else needed
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in ("import", "from") and not line.startswith(" "):
                name = words[1].split(".")[0]
                if name and name not in sys.stdlib_module_names and find_spec(name):
                    assert name in declared, f"{path.name}: {line}"


def test_the_docs_list_the_commands():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for command in cli.COMMANDS.values():
        start = "bash" if command.target.endswith(".sh") else "python -m"
        assert f"| `xmoe {command.name}` | {command.does} | `{start} {command.target}` |" in text
