"""Compile the layer's Triton kernels for A100 and H100 without a GPU, and inspect the machine code.

    xmoe bench gpu-compile [--settings NAME...] [--arch 80 90] [--out FILE]

Each setting is a shape class of the named architectures. A step of the layer is recorded up to the point where a
compiled kernel would be launched (gpu_record.py). What was recorded is compiled for sm_80 and sm_90 and disassembled.
Equal launches of several settings are compiled once. The table shows registers and spilled bytes of a thread, shared
memory of a block, instructions (those of a loop once) and those of tensor cores, and local loads and stores (spills)
inside the loops that multiply.

Exit 1: a matrix product spills in its main loop; a block's shared memory exceeds the device's; a product has no
tensor-core instruction and is not one of float32 operands without TF32; a kernel does not compile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import table, write_result
from benchmarks.gpu_record import Unit, named_settings, unique_units
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.moe import kernels

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes of one block on an A100, an H100
MULTIPLIES = re.compile(r"\b(HMMA|HGMMA|QGMMA|DMMA)\b")
SINGLE_MULTIPLIES = re.compile(r"\bFFMA\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP\b)\S")
COLUMNS = [
    "kernel", "arch", "dtype", "settings", "tile", "warps", "stages", "registers", "spilled", "loop_spills",
    "shared_KB", "instructions", "tensor_core",
]  # fmt: skip


def compile_unit(unit: Unit, arch: int) -> dict[str, Any]:
    """Compile one unit. Returns: a row of the table; its ``faults`` are the reasons for exit 1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row: dict[str, Any] = {
        "kernel": unit.name, "arch": f"sm_{arch}", "dtype": unit.dtype, "tile": unit.tile(),
        "settings": unit.settings[0] + (f" +{len(unit.settings) - 1}" if len(unit.settings) > 1 else ""),
        "all_settings": unit.settings, "warps": unit.options.get("num_warps", 4),
        "stages": unit.options.get("num_stages", 3), "faults": [],
    }  # fmt: skip
    source = ASTSource(fn=unit.kernel, signature=unit.signature, constexprs=unit.constants, attrs=unit.attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=unit.options)
    except Exception as error:
        row["faults"].append(f"does not compile: {type(error).__name__}: {str(error).strip()[:200]}")
        return row
    cubin = compiled.asm["cubin"]
    row |= _usage(cubin) | inspect_code(_ask("nvdisasm", "-c", cubin))
    row["shared_KB"] = compiled.metadata.shared / 1024
    if compiled.metadata.shared > SHARED_LIMIT[arch]:
        row["faults"].append(f"{compiled.metadata.shared} bytes of shared memory, the device has {SHARED_LIMIT[arch]}")
    if unit.is_product and row["loop_spills"]:
        row["faults"].append(f"{row['loop_spills']} local loads and stores in a main loop")
    if unit.needs_tensor_cores and not row["tensor_core"]:
        row["faults"].append("no tensor-core instruction")
    return row


def _ask(tool: str, flag: str, cubin: bytes) -> str:
    """The output of one of the binary tools that come with Triton for a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not path.exists():
        raise ValueError(
            f"this triton ({triton.__version__}) brings no {tool}; requirements-dev.txt pins one that does"
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, which are spills because the kernels have no arrays."""
    said = _ask("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise ValueError(f"cuobjdump told neither registers nor stack: {said[:500]}")
    return {"registers": int(found[1]), "spilled": int(found[2])}


def inspect_code(code: str) -> dict[str, int]:
    """Instructions, those of tensor cores, and local loads and stores in loops that multiply and hold no other loop.

    A loop is what lies between a label and a later branch back to it.
    """
    lines = code.splitlines()
    label_at = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"\s*(\.L_\w+):", line))}
    loops = []
    for number, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?`?\(?(\.L_\w+)", line)
        if target and label_at.get(target[1], number) < number:
            loops.append((label_at[target[1]], number))
    spills = 0
    for first, last in loops:
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        body = lines[first:last]
        products = sum(bool(MULTIPLIES.search(line)) for line in body)
        singles = sum(bool(SINGLE_MULTIPLIES.search(line)) for line in body)
        if not inner and (products or singles >= 64):
            spills += sum(bool(LOCAL.search(line)) for line in body)
    return {
        "instructions": sum(bool(INSTRUCTION.search(line)) for line in lines),
        "tensor_core": sum(bool(MULTIPLIES.search(line)) for line in lines),
        "loop_spills": spills,
    }


_JOBS: list[tuple[Unit, int]] = []  # what forked processes compile


def _compile_by_number(number: int) -> dict[str, Any]:
    return compile_unit(*_JOBS[number])


def compile_all(jobs: list[tuple[Unit, int]], processes: int) -> list[dict[str, Any]]:
    """A row for each job (a unit and an architecture). Forked processes share the recorded kernels."""
    _JOBS[:] = jobs
    if processes == 1:
        return [_compile_by_number(number) for number in range(len(jobs))]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_compile_by_number, range(len(jobs)), chunksize=1)


@reports_errors("gpu_compile")
def main(argv: Sequence[str] | None = None) -> int:
    settings = named_settings()
    parser = command_parser("bench gpu-compile", __doc__)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=list(settings),
        choices=list(settings),
        metavar="NAME",
        help="shape classes (default: all)",
    )
    parser.add_argument(
        "--arch", nargs="+", type=int, default=[80, 90], choices=list(SHARED_LIMIT), help="default: both"
    )
    parser.flag("--workers", type=at_least(1), default=os.cpu_count() or 1, help="processes that compile")
    parser.flag("--out", old="--json", help="also write the table, as JSON")
    options: argparse.Namespace = parser.parse_args(argv)
    if os.environ.pop("TRITON_INTERPRET", None):  # torch may have imported triton, which then cannot compile
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_compile", *sys.argv[1:]])
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default, without its warning
    if not kernels.find_spec("triton"):
        parser.error("triton is not installed here; requirements-dev.txt names the version that is tested")
    torch.set_num_threads(1)
    asked = {name: settings[name] for name in options.settings}
    jobs = [(unit, arch) for arch in options.arch for unit in unique_units(asked, arch)]
    rows = compile_all(jobs, options.workers)
    rows.sort(key=lambda row: (row["kernel"], row["arch"]))
    print(table(rows, COLUMNS))
    if options.out:
        print("written:", write_result("gpu-compile", {"rows": rows}, options.out))
    faults = [
        f"{row['kernel']} {row['arch']} {row['dtype']} ({row['settings']}): {f}" for row in rows for f in row["faults"]
    ]
    print(f"{len(rows)} kernels compiled from {len(options.settings)} settings, {len(faults)} faults")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
