"""``benchmarks/gpu.sh`` and ``benchmarks.gpu_layer`` as far as they go without a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu_layer, layer

ROOT = Path(__file__).parents[2]


def gpu_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_each_part_runs_alone_and_writes_where_it_is_told(tmp_path: Path) -> None:
    done = gpu_script("--dry-run", "--part", "layer", "--tokens", "8192", "--part", "tests", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "python" in line]
    assert [line.split(": ")[1] for line in lines] == ["gpu-layer-train-8192", "gpu-layer-infer-8192", "gpu-tests"]
    assert f"--out {tmp_path}/gpu-layer-train-8192.json" in lines[0]
    assert not list(tmp_path.iterdir())


def test_what_cannot_run_is_refused() -> None:
    done = gpu_script("--part", "everything")
    assert done.returncode == 2
    assert "--part is one of: tests kernels layer decode train generate compare; got 'everything'" in done.stderr
    if not torch.cuda.is_available():
        done = gpu_script("--part", "tests", "--python", "python3")
        assert done.returncode == 1


def test_a_peer_that_cannot_be_built_is_a_line_and_ratios_are_to_dense(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> dict[str, nn.Module]:
        raise ModuleNotFoundError("No module named 'peer'\nand more")

    assert list(gpu_layer.built("peer", missing)) == [("peer", "left out, ModuleNotFoundError: No module named 'peer'")]
    head = {"mode": "train", "tokens": 8, "case": "4x8"}
    rows = [
        {**head, "method": "dense", "eager_ms": 2.0, "graph_ms": 0.5},
        {**head, "method": "ours", "eager_ms": 3.0, "graph_ms": "waits"},
        {**head, "method": "peer", "note": "left out"},
    ]
    gpu_layer.with_ratios(rows)
    assert (rows[0]["graph_ratio"], rows[1]["eager_ratio"]) == (1.0, 1.5)
    assert "graph_ratio" not in rows[1]
    assert "train 8 4x8, peer: left out" in capsys.readouterr().err


def test_a_training_step_of_ours_has_the_balance_loss() -> None:
    ours = gpu_layer.our_layers(layer.CASES[1].config(), ("loop",), torch.zeros(1))["ours by torch, loop"]
    x_TD = torch.randn(6, layer.WIDTH)
    with torch.no_grad():
        ours.experts.w2.zero_()  # the output says nothing about the router, and its weights get no gradient from it
        ours.experts.b2.zero_()
    gradients = gpu_layer.train_step(ours, x_TD)()
    names = ["x", *dict(ours.named_parameters())]
    assert dict(zip(names, gradients, strict=True))["router.weight"].abs().sum() > 0


def test_grouped_gemms_alone_compute_each_experts_rows() -> None:
    from benchmarks.peers import GroupedGemms

    module = GroupedGemms(8, 3, 16, 2)
    rows = torch.randn(module.num_rows, 8)
    want = [nn.functional.gelu(rows[2 * e : 2 * e + 2] @ module.w1[e]) @ module.w2[e] for e in range(3)]
    torch.testing.assert_close(module(rows), torch.cat(want))
