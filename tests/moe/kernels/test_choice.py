"""Where the Triton way is taken, where it is not, and the reasons that are given."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xmoe_fairseq.moe import MoEConfig, kernels

pytest.importorskip("triton", reason="triton is not installed")

from xmoe_fairseq.moe.kernels import check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
ROOT = Path(__file__).parents[3]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
HERE = GPU if torch.cuda.is_available() else CPU


@pytest.fixture(autouse=True)
def looks_afresh() -> Iterator[None]:
    """Forget before and after each test what was found out about a device, which is once a process otherwise."""
    kernels._obstacle.cache_clear()
    yield
    kernels._obstacle.cache_clear()


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(check, "self_check", lambda device, dtype, *ways: None)


def chosen(
    compute: str = "auto", device: torch.device = GPU, dtype: torch.dtype = torch.float32, **more: object
) -> bool:
    return kernels.chosen(MoEConfig(8, 4, 8, compute=compute, **more), device, dtype, training=True)


@pytest.mark.usefixtures("pretend_gpu")
def test_auto_takes_kernels_on_gpus_alone() -> None:
    assert chosen()
    assert chosen("triton")
    assert not chosen(device=CPU)
    assert not chosen("loop")
    assert not chosen(dtype=torch.float64)
    assert not chosen(threshold=1.0, capacity_factor=None)  # one dense product of everything is cheaper
    assert chosen("triton", threshold=1.0, capacity_factor=None)


@pytest.mark.usefixtures("pretend_gpu")
def test_a_failed_self_check_warns_once_and_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "self_check", lambda device, dtype, *ways: "output of a small training step differ by 3")
    with caplog.at_level(logging.WARNING):
        assert not chosen()
        assert not chosen()
    (said,) = caplog.messages
    assert "differ by 3" in said
    assert "torch computes instead" in said
    with pytest.raises(RuntimeError, match=r"moe_compute triton cannot run here: output .* differ by 3"):
        chosen("triton")


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize(
    ("name", "stands_for", "reason"),
    [
        ("xmoe_fairseq.moe.kernels.find_spec", lambda name: None, "triton is not installed"),
        ("torch.cuda.get_device_capability", lambda device: (7, 5), "older than compute capability 8.0"),
    ],
)
def test_the_reason_is_told_by_name_and_auto_does_without(
    name: str, stands_for: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, stands_for)
    assert not chosen()
    with pytest.raises(RuntimeError, match=f"{reason}.*choose moe_compute auto"):
        chosen("triton")


def test_by_name_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="tensors lie on cpu, which only TRITON_INTERPRET=1 serves"):
        chosen("triton", device=CPU)
    with pytest.raises(RuntimeError, match=r"its kernels take torch\.float32.*not torch\.float64"):
        chosen("triton", dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_self_check_agrees_and_leaves_random_numbers_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert check.self_check(HERE, dtype, kernels.make_plan, kernels.expert_sum) is None
    assert torch.equal(torch.rand(3), expected)


def test_the_self_check_sees_wrong_numbers_and_errors() -> None:
    def wrong(*inputs: Any) -> torch.Tensor:
        return kernels.expert_sum(*inputs) * 1.01

    told = check.self_check(HERE, torch.float32, kernels.make_plan, wrong) or ""
    assert "output of a small training step differ by" in told

    def mixed_up(router: Any, x_TD: Any, *others: Any) -> Any:
        return kernels.make_plan(router, x_TD if torch.is_grad_enabled() else x_TD.flip(0), *others)

    told = check.self_check(HERE, torch.float32, mixed_up, kernels.expert_sum) or ""
    assert "index_A of 20 tokens differ" in told

    def broken(*inputs: Any) -> torch.Tensor:
        raise OSError("no compiler\nand more lines")

    assert check.self_check(HERE, torch.float32, kernels.make_plan, broken) == "OSError: no compiler"


def test_importing_and_using_the_layer_imports_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"  # importing it would raise
        "import torch, xmoe_fairseq.moe as moe\n"
        "y, plan = moe.MoELayer(moe.MoEConfig(8, 4, 8))(torch.randn(5, 8, requires_grad=True))\n"
        "y.sum().backward()\n"
        "try: moe.MoELayer(moe.MoEConfig(8, 4, 8, compute='triton'))(torch.randn(5, 8))\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the package triton is not installed" in done.stdout
