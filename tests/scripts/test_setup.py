"""scripts/setup.sh with an interpreter that only notes what pip is asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
*"-m pip check"*) exit 0 ;;
*"-m pip"*)
    echo "$*" >>"{folder}/pip.log"
    [[ ! -f "{folder}/broken" || $* != *no-build-isolation* ]] ;;
*"import fairseq"*) exit 0 ;;
*) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts and pins with an environment whose pip does nothing; returns (folder, run)."""
    for name in ("scripts", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(INTERPRETER.format(folder=tmp_path, python=sys.executable))
    interpreter.chmod(0o755)

    def run(*arguments, **environment):
        log = tmp_path / "pip.log"
        log.write_text("")
        variables = {name: value for name, value in os.environ.items() if not name.startswith("XMOE_")}
        command = ["bash", str(tmp_path / "scripts" / "setup.sh"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=variables | environment, check=False)
        return result, log.read_text().splitlines()

    return tmp_path, run


def test_a_second_call_installs_nothing(project):
    _, run = project
    result, calls = run("--dev")
    assert result.returncode == 0, result.stderr
    assert len(calls) == 5  # what the build needs, the rest, fairseq, this checkout, the development tools
    assert "--no-build-isolation --no-deps" in calls[2]
    assert calls[3].endswith(f"--no-build-isolation --no-deps --editable {project[0]}")
    assert run("--dev")[1] == []


def test_changed_pins_install_again(project):
    folder, run = project
    run()
    with (folder / "requirements.txt").open("a") as pins:
        pins.write("six==1.17.0\n")
    assert len(run()[1]) == 3


def test_another_checkout_with_the_same_environment_is_installed_in_its_place(project):
    folder, run = project
    run()
    (folder / ".venv" / ".xmoe-package").write_text("/another/checkout\n")
    assert [call.split()[-2:] for call in run()[1]] == [["--editable", str(folder)]]


def test_a_failed_step_names_itself_and_the_next_call_repeats_it(project):
    folder, run = project
    (folder / "broken").touch()
    result, _ = run()
    assert result.returncode == 1
    assert "set-up step failed: compile and install fairseq" in result.stderr.splitlines()[-1]
    (folder / "broken").unlink()
    result, calls = run()
    assert (result.returncode, len(calls)) == (0, 4)


def test_an_unsupported_python_is_refused_with_the_way_out(project):
    folder, run = project
    shutil.rmtree(folder / ".venv")
    old = folder / "python3.9"
    old.write_text("#!/usr/bin/env bash\n[[ $2 != *sys.exit* ]] && echo 3.9.18\n")
    old.chmod(0o755)
    result, calls = run(XMOE_PYTHON=str(old))
    assert (result.returncode, calls) == (1, [])
    assert f"Python 3.10, 3.11 or 3.12 is needed, but {old} is 3.9.18" in result.stderr
    assert "XMOE_PYTHON=/path/to/python3.11 bash scripts/setup.sh" in result.stderr
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("ours", [False, True])
def test_only_an_environment_of_the_script_is_emptied(project, ours):
    """Another Python is asked for; the stand-in for it makes no environment."""
    folder, run = project
    kept = folder / ".venv" / "of-the-user"
    kept.write_text("precious")
    (folder / ".venv" / "bin" / "python").unlink()
    if ours:
        (folder / ".venv" / ".xmoe").touch()
    other = folder / "python3.11"
    other.write_text(f'#!/usr/bin/env bash\n[[ $2 != venv ]] || echo "$*" >>{folder}/venv.log\n[[ $2 != venv ]]\n')
    other.chmod(0o755)
    result, calls = run(XMOE_PYTHON=str(other))
    assert (result.returncode, calls, kept.read_text()) == (1, [], "precious")
    if ours:
        assert (folder / "venv.log").read_text() == f"-m venv --clear {folder}/.venv\n"
    else:
        assert not (folder / "venv.log").exists()
        assert "was not made by this project; remove it, or name another place: XMOE_VENV=DIR" in result.stderr
