"""scripts/train_multi.sh with ranks that only wait: what a signal does, and what a failed rank does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """#!/usr/bin/env bash
trap 'exit 75' USR1
trap '' TERM
touch "$READY.$$"
[[ ! -f $READY.fail ]] || exit 3
while :; do sleep 0.05; done
"""


@pytest.fixture
def start(tmp_path):
    """Two ranks; returns the process once both wait."""
    (tmp_path / "bin").mkdir()
    for name, text in {"fairseq-train": RANK, "fairseq-generate": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"XMOE_VENV": str(tmp_path), "READY": str(tmp_path / "ready")}
    command = ["bash", str(ROOT / "scripts" / "train_multi.sh"), "--ranks", "2", "--grace", "1", "--", "data", "--cpu"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("ready.[0-9]*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_every_rank_and_the_exit_code_says_saved(start, number):
    start.send_signal(number)
    errors = start.communicate(timeout=20)[1]
    assert start.returncode == 75, errors
    assert "stopped by a signal, saved; the same command continues" in errors


def test_a_failed_rank_still_ends_the_others(tmp_path, request):
    (tmp_path / "ready.fail").touch()
    process = request.getfixturevalue("start")
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 3
    assert "ended with code 3; stopping the others" in errors
