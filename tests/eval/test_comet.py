"""eval/comet.sh: what it would run, and what it refuses. COMET itself is not installed for tests."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "comet.sh"


def run(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)


def test_dry_run_prints_lines_and_runs_none(tmp_path):
    done = run(tmp_path, "--source", "s", "--hypotheses", "h x", "--references", "r", "--out", "o", "--dry-run")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) == 4
    assert lines[2].startswith(".venv-comet/bin/comet-score -s s -t h\\ x -r r --model Unbabel/wmt22-comet-da")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("hypotheses", "code", "message"),
    [
        (b"a\n", 1, "line counts differ"),
        (b"", 1, "has no lines"),
        (b"\xff\nb\n", 1, "invalid UTF-8"),
        (None, 1, "no such file"),
    ],
)
def test_bad_input_is_named_before_anything_is_installed(tmp_path, hypotheses, code, message):
    (tmp_path / "s").write_text("a\nb\n")
    if hypotheses is not None:
        (tmp_path / "h").write_bytes(hypotheses)
    done = run(tmp_path, "--source", "s", "--hypotheses", "h", "--reference", "s", "--json", "o")  # older names
    assert (done.returncode, message in done.stderr) == (code, True)
    assert "--json is now --out" in done.stderr
    assert not (tmp_path / ".venv-comet").exists()


def test_missing_arguments_exit_with_2(tmp_path):
    assert run(tmp_path, "--source", "s").returncode == 2
