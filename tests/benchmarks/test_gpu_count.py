"""What the Triton way may cost on paper: launches, host waits, bytes, time and kept memory of a layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu_count

ROOT = Path(__file__).parents[2]
FLOAT = 4  # bytes


def test_a_call_is_counted_with_what_it_reads_writes_and_multiplies() -> None:
    count = gpu_count.Count()
    left, right, bias = torch.randn(5, 7), torch.randn(7, 3), torch.randn(3)
    with gpu_count.CountedCalls(count):
        torch.addmm(bias, left, right)
        left.t()[1].view(5, 1).detach()  # views
        torch.empty(1000)
    assert count.calls == {"addmm": [1, FLOAT * (35 + 21 + 3 + 15), 3.0]}
    assert (count.launches, count.waits, count.flops) == (1, 0, 2 * 5 * 7 * 3)
    assert count.seconds == gpu_count.LAUNCH_SECONDS


def test_waits_sorts_and_what_is_broadcast() -> None:
    count = gpu_count.Count()
    values = torch.randn(1000)
    with gpu_count.CountedCalls(count):
        int(values.argmax())
        values.nonzero()
        values.sort()
        torch.zeros(()).expand(1000) + values
    assert count.waits == 2
    assert count.calls["sort"][2] == pytest.approx(60.0)
    assert count.calls["add"][1] == FLOAT * (1 + 1000 + 1000)


def test_half_precision_products_are_not_computed_but_counted() -> None:
    count = gpu_count.Count()
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    with gpu_count.CountedCalls(count):
        y = layer(x)
    assert y.shape == (3, 4)
    assert count.flops == 2 * 3 * 8 * 4


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command's own JSON; a process of its own, since it sets how Triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    out = tmp_path_factory.mktemp("count") / "count.json"
    command = [sys.executable, "-m", "benchmarks.gpu_count", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


# setting: launches, MB and paper time relative to dense, forward and backward of 8,192 tokens, at most
LIMITS = {"32x2048": (21, 1000, 1.2), "64x1024": (21, 1150, 1.3), "128x512": (21, 1450, 1.6)}


@pytest.mark.slow
@pytest.mark.parametrize("case", LIMITS)
def test_a_training_step_keeps_its_numbers(case: str, counted: dict[str, Any]) -> None:
    found = {
        row["way"]: row for row in counted["rows"] if row["case"] == case and row["mode"] == "forward and backward"
    }
    launches, megabytes, of_dense = LIMITS[case]
    ours = found["triton"]
    assert ours["launches"] <= launches
    assert ours["waits"] == 0
    assert ours["MB"] <= megabytes
    assert ours["of_dense"] <= of_dense
    assert ours["MB"] <= ours["tile_MB"]
    # both ways multiply the same rows; the router's gate is the only other product
    assert ours["GFLOP"] == pytest.approx(found["torch"]["GFLOP"], rel=0.01)
    # the count of the dense FFN is known: two products forward, four backward, of 8,192 tokens
    assert found["dense"]["GFLOP"] == pytest.approx(6 * 2 * 8192 * 512 * 2048 / 1e9)
    assert found["dense"]["launches"] in range(10, 12)
    assert found["torch"]["launches"] > 100  # as counted before there were kernels


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [320, 5])
def test_a_decoding_step_keeps_its_numbers(tokens: int, counted: dict[str, Any]) -> None:
    (ours,) = [row for row in counted["rows"] if (row["way"], row["tokens"]) == ("triton", tokens)]
    assert ours["launches"] <= (8 if tokens > 32 else 4)
    assert ours["waits"] == 0


@pytest.mark.slow
def test_memory_kept_for_backward_is_near_the_dense_ffns(counted: dict[str, Any]) -> None:
    assert counted["kept"]["64x1024"]["of_dense"] <= 1.2


def test_without_triton_one_line_says_what_is_wanting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_count.kernels, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        gpu_count.main([])
    assert "triton is not installed here" in capsys.readouterr().err
