"""What every benchmark shares: interleaved timing, kept memory, a record of the machine, flags, tables, result files.

Times are medians of runs in which the candidates take turns. They are reported as ratios to one candidate, because a
busy machine slows all of them alike. Each result file holds machine, versions and commit.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from xmoe_fairseq.allocator import ask_for_huge_pages, keep_freed_memory
from xmoe_fairseq.command_line import CommandParser, at_least
from xmoe_fairseq.files import write_aside

RESULTS = Path(__file__).resolve().parent / "results"


def add_timing_flags(parser: CommandParser, repeats: int) -> None:
    """``--dtype``, ``--device``, ``--repeats`` and ``--out`` of a benchmark that times layers in turns."""
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add_device_flag(parser)
    repeats_help = f"timed turns of every candidate (default {repeats})"
    parser.add_argument("--repeats", type=at_least(1), default=repeats, metavar="N", help=repeats_help)
    add_out_flag(parser)


def add_device_flag(parser: CommandParser) -> None:
    parser.flag("--device", default="cpu", choices=["cpu", "cuda"], metavar=None, help="default cpu")


def add_out_flag(parser: CommandParser) -> None:
    parser.flag("--out", help="where the JSON goes (default: benchmarks/results/)")


def fairseq(tool: str) -> list[str]:
    """The command ``fairseq-TOOL`` of this interpreter, which need not be in PATH."""
    return [sys.executable, "-m", f"fairseq_cli.{tool}"]


def settle_memory() -> None:
    """Keep freed memory in the process, as a training on a CPU does, for every candidate alike. Call it first."""
    ask_for_huge_pages()
    keep_freed_memory()


def interleaved(
    candidates: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each run of each candidate. The candidates take turns; one untimed round goes first."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            elapsed = timed(run, device)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def timed(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall seconds of one call, device work included."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summarise(seconds: Mapping[str, list[float]], beside: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and median, 10th and 90th percentile of the ratios to ``beside`` within each turn."""
    rows = {}
    for name, runs in seconds.items():
        ratios = sorted(mine / other for mine, other in zip(runs, seconds[beside], strict=True))
        rows[name] = {
            "ms": 1e3 * statistics.median(runs),
            "ratio": statistics.median(ratios),
            "ratio_p10": ratios[len(ratios) // 10],
            "ratio_p90": ratios[-1 - len(ratios) // 10],
        }
    return rows


def compare(
    candidates: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time the candidates in turns. Returns: their medians, and ratios to the candidate ``dense``."""
    return summarise(interleaved(candidates, repeats, device), beside="dense")


def kept_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once; parameters are not counted."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(kept.values())
    del output
    gc.collect()
    return total


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes allocated at the worst moment of ``run``, beyond those allocated before it.

    On CUDA this is the allocator's own figure, on a CPU the highest running sum of the profiler's allocation record.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def machine() -> dict[str, Any]:
    """The facts of machine, versions and commit that a result file holds."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
        cwd=RESULTS.parent,
    )
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "commit": commit.stdout.strip() or "unknown",
    }


def write_result(name: str, result: dict[str, Any], out: str | None) -> Path:
    """Write ``result`` and the machine as JSON to ``out`` or ``benchmarks/results/DATE-NAME.json``, by a move."""
    record = {"benchmark": name, "machine": machine(), **result}
    path = Path(out) if out else RESULTS / f"{record['machine']['date'][:10]}-{name}.json"
    write_aside(path, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
    return path


def table(rows: list[Mapping[str, Any]], columns: list[str]) -> str:
    """A Markdown table; floats with three significant digits."""

    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
