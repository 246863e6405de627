"""allocator.py: page faults of a process that frees and asks again, before and after the settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from xmoe_fairseq import allocator
from xmoe_fairseq.patches import kept_memory

PROGRAM = """
import json, os, resource, sys
import xmoe_fairseq.moe, torch
from xmoe_fairseq.allocator import ask_for_huge_pages, keep_freed_memory

def faults_of_a_second_buffer():
    torch.ones(16 << 20)  # 64 MB, freed at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

bare = faults_of_a_second_buffer()
huge = os.environ.get("THP_MEM_ALLOC_ENABLE")
kept = keep_freed_memory()
faults_of_a_second_buffer()  # the heap may need three buffers to reach its size: where it starts is drawn by chance
print(json.dumps({"bare": bare, "huge": huge, "kept": kept, "after": faults_of_a_second_buffer()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_freed_buffer_is_used_again_only_after_the_call() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["kept"], "this Linux has another C library than glibc"
    assert seen["bare"] > 10_000  # importing the layer changes nothing: 64 MB are mapped again, page by page
    assert seen["huge"] is None
    assert seen["after"] < 100


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    other = SimpleNamespace(mallopt=lambda *call: calls.append(call))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: other)
    assert not allocator.keep_freed_memory()
    assert calls == []


def test_a_value_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    allocator.ask_for_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


@pytest.mark.parametrize(("cpu", "gpus", "expected"), [(True, True, 1), (False, True, 0), (False, False, 1)])
def test_a_trainer_on_the_cpu_keeps_memory(
    cpu: bool, gpus: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(kept_memory, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(kept_memory.torch.cuda, "is_available", lambda: gpus)
    cfg = SimpleNamespace(common=SimpleNamespace(cpu=cpu))
    kept_memory._start(lambda trainer, cfg, task: calls.append(task), None, cfg, "stock")
    assert calls == ["kept"] * expected + ["stock"]
