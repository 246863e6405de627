"""A training that is killed or told to stop, at random moments, and continued ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import stock
from xmoe_fairseq.checkpoints.files import load_checkpoint
from xmoe_fairseq.patches.signals import MARKER, SAVED

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KILLS, SIGNALS = 16, 4
KILLED = 9
# Ten updates an epoch, validated and saved every three and at epoch ends; dropout and Gumbel noise are on. The learning
# rate is too high to converge, so that early stopping ends the run.
TRAIN = shlex.split(
    "--arch xmoe_transformer_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --moe-expert-dim 8 "
    "--moe-num-experts 4 --moe-router top_k --moe-top-k 2 --moe-router-noise gumbel --dropout 0.1 --cpu --seed 3 "
    "--criterion label_smoothed_cross_entropy_with_load_balance --optimizer adam --lr 0.05 --clip-norm 1 "
    "--batch-size 4 --num-workers 0 --save-interval-updates 3 --keep-interval-updates 1 --keep-best-checkpoints 2 "
    "--no-epoch-checkpoints --patience 4 --max-update 60 --update-epoch-batch-itr True --log-format simple "
    "--required-batch-size-multiple 1"
)


def run(folder: Path, arguments: list[str], runs: list[dict[str, Any]]) -> list[tuple[int, int | None]]:
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({"arguments": arguments, "runs": runs}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("interrupted.py")), str(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def job(folder: Path, name: str, at: int = 0, how: str = "kill") -> dict[str, Any]:
    return {"save_dir": str(folder / name), "log": str(folder / f"{name}.log"), "at": at, "how": how}


def content(path: Path) -> dict[str, Any]:
    """What must be equal of a checkpoint: everything but times of the clock."""
    state = load_checkpoint(path)
    extra = state["extra_state"]
    return {
        "model": state["model"],
        "optimizer": state["last_optimizer_state"]["state"],
        "updates": state["optimizer_history"][-1]["num_updates"],
        "early_stopping": extra["early_stopping"],
        "place": extra["train_iterator"],
        "scores": (extra["val_loss"], extra["best"]),
    }


def assert_equal(got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_equal(got[name], want[name])
    elif torch.is_tensor(want):
        assert torch.equal(got, want)
    else:
        assert got == want


@pytest.mark.timeout(900)
def test_killed_or_stopped_anywhere_and_continued_it_ends_the_same(tmp_path: Path) -> None:
    arguments = [str(stock.binarised_pairs(tmp_path)), "--user-dir", str(stock.USER_DIR), *TRAIN]
    [(code, events)] = run(tmp_path, arguments, [job(tmp_path, "whole")])
    log = (tmp_path / "whole.log").read_text()
    assert code == 0, log[-3000:]
    whole = {path.name: content(path) for path in (tmp_path / "whole").iterdir()}
    assert "early stop: no better loss in the last 4 validations" in log
    assert whole["checkpoint_last.pt"]["updates"] < 60
    moments = random.Random(1).sample(range(1, events + 1), KILLS + SIGNALS)
    runs = []
    for number, at in enumerate(moments):
        how = "kill" if number < KILLS else "signal"
        runs += [job(tmp_path, f"run{number}", at, how), job(tmp_path, f"run{number}")]
    ended = run(tmp_path, arguments, runs)
    for number, at in enumerate(moments):
        first, second = (code for code, _ in ended[2 * number : 2 * number + 2])
        log = (tmp_path / f"run{number}.log").read_text()
        # a signal at the last update comes too late to stop anything
        assert first in ((KILLED,) if number < KILLS else (SAVED, 0)), (at, log[-3000:])
        assert second == 0, (at, log[-3000:])
        folder = tmp_path / f"run{number}"
        assert {path.name for path in folder.iterdir()} == whole.keys(), at
        for name, want in whole.items():
            assert_equal(content(folder / name), want)
    assert MARKER not in whole
