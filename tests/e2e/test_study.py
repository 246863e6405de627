"""scripts/run_study.sh on two pairs: killed in the middle it continues, to the same study.json."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_run_pair import CONFIG, WORDS, write_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
STUDY = """
pairs:
  uk-en: {train: PLACE/train, valid: PLACE/valid, test: PLACE/test}
  de-en: {train: PLACE/train, valid: PLACE/valid, test: PLACE/test}
methods:
  dense: {config: dense.yaml}
  xmoe: {config: xmoe.yaml}
seeds: [1, 2]
set: {optimization.max_update: 20}
run: {vocab-size: 40, average: "last:2", beam: 2, device: cpu, workers: 1}
calibrate: []
"""


def start(study: Path, out: Path) -> subprocess.Popen[str]:
    command = ["bash", str(ROOT / "scripts" / "run_study.sh"), "--study", str(study), "--out", str(out), "--jobs", "2"]
    environment = {**os.environ, "XMOE_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_study_continues_to_the_same_results(tmp_path):
    write_corpus(tmp_path)
    for name in ("train", "valid", "test"):  # another "language": the same words backwards
        text = (tmp_path / f"{name}.uk").read_text(encoding="utf-8")
        for word in WORDS:
            text = text.replace(word, word[::-1])
        (tmp_path / f"{name}.de").write_text(text, encoding="utf-8")
    (tmp_path / "xmoe.yaml").write_text(CONFIG)
    dense = CONFIG.replace("xmoe_transformer", "dense_transformer").replace("_with_load_balance", "")
    (tmp_path / "dense.yaml").write_text("\n".join(line for line in dense.splitlines() if "moe_" not in line))
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.replace("PLACE", str(tmp_path)))

    whole = start(study, tmp_path / "whole")
    errors = whole.communicate()[1]
    assert whole.returncode == 0, errors
    assert "[8/8]" in errors
    expected = (tmp_path / "whole" / "study.json").read_bytes()
    content = json.loads(expected)
    assert content["missing"] == []
    assert content["over_seeds"]["dev_loss"]["all pairs"]["xmoe"]["df"] == 2
    assert (tmp_path / "whole" / "study.html").stat().st_size > 100_000

    # the same with two cells to go; it is killed while the second of them trains
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    (part / "study.json").unlink()
    cells = [part / "cells" / name for name in ("uk-en/xmoe/seed-2", "de-en/xmoe/seed-1")]
    for cell in cells:
        shutil.rmtree(cell)
    killed, last = start(study, part), cells[1] / "checkpoints" / "checkpoint_last.pt"
    while not last.exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (part / "study.json").exists()
    again = start(study, part)
    errors = again.communicate()[1]
    assert again.returncode == 0, errors
    assert (part / "study.json").read_bytes() == expected
