"""Compiles the layer's Triton kernels for A100 and H100 without a GPU, and looks at the machine code.

    xmoe bench gpu-compile [--settings NAME...] [--arch 80 90] [--json FILE]

Each setting is a shape class of the named architectures. A step of the layer is recorded up to the point where a
compiled kernel would be launched; what was recorded is compiled for sm_80 and sm_90 and disassembled. Equal launches of
several settings are compiled once. The table: registers and spilled bytes of a thread, shared memory of a block,
tensor-core instructions, and local loads and stores (spills) inside the loops that multiply.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import table, write_result
from xmoe_fairseq.command_line import command_parser
from xmoe_fairseq.moe import MoEConfig, MoELayer, kernels

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes of one block on an A100, an H100
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
MULTIPLIES = re.compile(r"\b(HMMA|HGMMA|QGMMA|DMMA)\b")
SINGLE_MULTIPLIES = re.compile(r"\bFFMA\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")
COLUMNS = [
    "kernel", "arch", "dtype", "settings", "tile", "warps", "stages", "registers", "spilled", "loop_spills",
    "shared_KB", "tensor_core",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A layer and a step of it. ``mode``: train, or decode (no gradient, no capacity, no padding)."""

    config: MoEConfig
    tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16
    mode: str = "train"
    autocast: bool = False
    tf32: bool = False


def _settings() -> dict[str, Setting]:
    """Shape classes: models of the paper's tables, each router that kernels serve, dtypes, decoding."""
    translation = {
        f"{experts}x{hidden}": MoEConfig(512, experts, hidden, threshold=0.9, capacity_factor=gamma)
        for experts, hidden, gamma in ((32, 2048, 1.0), (64, 1024, 2.0), (128, 512, 4.0))
    }
    chosen = {name: Setting(config) for name, config in translation.items()}
    base = translation["64x1024"]
    for width in (768, 1024):
        for experts in (8, 16, 32, 64):
            hidden = 8 * 4 * width // experts
            shape = MoEConfig(width, experts, hidden, threshold=0.9, capacity_factor=experts / 8)
            chosen[f"lm {width} {experts}x{hidden}"] = Setting(shape)
    chosen["tiny"] = Setting(MoEConfig(128, 8, 256, threshold=0.9, capacity_factor=2.0), tokens=4096)
    for router, more in {
        "switch": {}, "top_k": {"top_k": 2}, "adamoe": {"top_k": 4, "num_null_experts": 64}, "hash": {},
    }.items():  # fmt: skip
        config = replace(base, router=router, z_loss_weight=0.0, **more)
        chosen[router] = Setting(config)
    chosen["normalised, z-loss, dropout"] = Setting(
        replace(base, normalize_weights=True, z_loss_weight=0.01, activation_dropout=0.1)
    )
    chosen["float16"] = Setting(base, dtype=torch.float16)
    chosen["float32"] = Setting(base, dtype=torch.float32)
    chosen["tf32"] = Setting(base, dtype=torch.float32, tf32=True)
    chosen["autocast"] = Setting(base, autocast=True)
    for name, config in translation.items():
        for tokens in (640, 320, 5):
            chosen[f"decode {tokens} {name}"] = Setting(config, tokens=tokens, mode="decode")
    return chosen


@dataclass
class Unit:
    """A kernel with all that Triton compiles for, and whether it multiplies matrices."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    is_product: bool
    needs_tensor_cores: bool
    dtype: str
    settings: list[str]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def key(self) -> str:
        return repr((self.name, self.signature, self.constants, sorted(self.attributes), self.options))

    def tile(self) -> str:
        names = self.kernel.arg_names
        blocks = {names[place[0]]: value for place, value in self.constants.items()}
        return " ".join(f"{n.removeprefix('BLOCK_').lower()}{v}" for n, v in blocks.items() if n.startswith("BLOCK_"))


@contextmanager
def _stopped_before_launching(calls: list[tuple[Any, ...]], arch: int) -> Iterator[None]:
    """The layer takes CPU tensors for those of a GPU of ``arch``; compiled launches are collected and not run."""
    from xmoe_fairseq.moe.kernels import launch, tiles

    chosen, run, capability = kernels.chosen, launch._run_compiled, tiles.capability
    kernels.chosen = lambda *_: True
    tiles.capability = lambda: divmod(arch, 10)
    launch._run_compiled = lambda kernel, grid, arguments, constants: calls.append((kernel, arguments, constants))
    try:
        yield
    finally:
        kernels.chosen, launch._run_compiled, tiles.capability = chosen, run, capability


def record_step(name: str, setting: Setting, arch: int) -> list[Unit]:
    """What one step of the layer would launch."""
    from xmoe_fairseq.moe.kernels import launch

    trains = setting.mode == "train"
    layer = MoELayer(setting.config)
    layer = layer if setting.autocast else layer.to(setting.dtype)
    layer.train(trains)
    x_TD = torch.zeros(setting.tokens, setting.config.embed_dim, requires_grad=trains)
    x_TD = x_TD if setting.autocast else x_TD.detach().to(setting.dtype).requires_grad_(trains)
    token = torch.arange(setting.tokens)
    calls: list[tuple[Any, ...]] = []
    torch.backends.cuda.matmul.allow_tf32 = setting.tf32
    with (
        torch.set_grad_enabled(trains),
        torch.autocast("cpu", setting.dtype, enabled=setting.autocast),
        launch.record() as recorded,
        _stopped_before_launching(calls, arch),
    ):
        y_TD, plan = layer(x_TD, token % 10 == 0 if trains else None, token)
        if trains:
            loss = y_TD.float().sum() + plan.balance_loss
            (loss if plan.z_loss is None else loss + plan.z_loss).backward()
    units = []
    for (kernel, arguments, constants), launched in zip(calls, recorded.launches, strict=True):
        unit = _unit(kernel, arguments, constants)
        unit.is_product = launched.cost.flops > 0
        unit.needs_tensor_cores = unit.is_product and not _is_exact(arguments, constants)
        unit.dtype = "tf32" if setting.tf32 else str(setting.dtype).removeprefix("torch.")
        unit.settings = [name]
        units.append(unit)
    return units


def _unit(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Unit:
    """As Triton specialises: integers of 1 are constants; what is divisible by 16 is known to be."""
    names = kernel.arg_names
    unspecialised = set(kernel.do_not_specialize or ())
    signature: dict[str, str] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (name, argument) in enumerate(zip(names, arguments, strict=False)):
        may_specialise = not {name, place} & unspecialised
        if isinstance(argument, torch.Tensor):
            signature[name] = POINTERS[argument.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        elif argument == 1 and may_specialise:
            signature[name], fixed[(place,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
            if argument % 16 == 0 and may_specialise:
                attributes[(place,)] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        if name not in OPTIONS:
            signature[name], fixed[(names.index(name),)] = "constexpr", value
    options = {name: constants[name] for name in OPTIONS if name in constants}
    return Unit(kernel, signature, fixed, attributes, options, False, False, "", [])


def _is_exact(arguments: tuple[Any, ...], constants: dict[str, Any]) -> bool:
    """Whether float32 operands are multiplied as float32, which tensor cores cannot: the default without TF32, and the
    router's products under autocast."""
    precision = constants.get("PRECISION", constants.get("DOT"))
    return precision == "ieee" and arguments[0].dtype == torch.float32


def unique_units(settings: dict[str, Setting], arch: int) -> list[Unit]:
    """What steps of all settings launch on a GPU of ``arch``, equal launches once."""
    found: dict[str, Unit] = {}
    for name, setting in settings.items():
        for unit in record_step(name, setting, arch):
            known = found.setdefault(unit.key(), unit)
            if name not in known.settings:
                known.settings.append(name)
    return list(found.values())


def compile_unit(unit: Unit, arch: int) -> dict[str, Any]:
    """One row of the table; ``faults`` lists what must not be."""
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
        row["faults"].append(f"{compiled.metadata.shared} bytes of shared memory, {SHARED_LIMIT[arch]} there are")
    if unit.is_product and row["loop_spills"]:
        row["faults"].append(f"{row['loop_spills']} local loads and stores in a main loop")
    if unit.needs_tensor_cores and not row["tensor_core"]:
        row["faults"].append("no tensor-core instruction")
    return row


def _ask(tool: str, flag: str, cubin: bytes) -> str:
    """What one of the binary tools that Triton brings says of a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not path.exists():
        sys.exit(f"this triton ({triton.__version__}) brings no {tool}; requirements-dev.txt pins one that does")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: what the assembler spilled, since kernels have no arrays."""
    said = _ask("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise ValueError(f"cuobjdump told neither registers nor stack: {said[:500]}")
    return {"registers": int(found[1]), "spilled": int(found[2])}


def inspect_code(code: str) -> dict[str, int]:
    """Tensor-core instructions, and local loads and stores in loops that multiply and hold no other loop.

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
    return {"tensor_core": sum(bool(MULTIPLIES.search(line)) for line in lines), "loop_spills": spills}


_JOBS: list[tuple[Unit, int]] = []  # what forked processes compile


def _compile_by_number(number: int) -> dict[str, Any]:
    return compile_unit(*_JOBS[number])


def compile_all(jobs: list[tuple[Unit, int]], processes: int) -> list[dict[str, Any]]:
    """A row for each job, a unit and an architecture; forked processes share the recorded kernels."""
    _JOBS[:] = jobs
    if processes == 1:
        return [_compile_by_number(number) for number in range(len(jobs))]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_compile_by_number, range(len(jobs)), chunksize=1)


def main() -> None:
    settings = _settings()
    parser = command_parser("bench gpu-compile", __doc__)
    parser.add_argument("--settings", nargs="+", default=list(settings), choices=list(settings), metavar="NAME")
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90], choices=list(SHARED_LIMIT))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file")
    options: argparse.Namespace = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):  # torch may have imported triton, which then cannot compile
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_compile", *sys.argv[1:]])
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does unasked, without its warning
    if not kernels.find_spec("triton"):
        parser.error("triton is not installed here; requirements-dev.txt names the version that is tested")
    torch.set_num_threads(1)
    asked = {name: settings[name] for name in options.settings}
    jobs = [(unit, arch) for arch in options.arch for unit in unique_units(asked, arch)]
    rows = compile_all(jobs, options.workers)
    rows.sort(key=lambda row: (row["kernel"], row["arch"]))
    print(table(rows, COLUMNS))
    if options.json:
        print("written:", write_result("gpu-compile", {"rows": rows}, options.json))
    faults = [
        f"{row['kernel']} {row['arch']} {row['dtype']} ({row['settings']}): {f}" for row in rows for f in row["faults"]
    ]
    print(f"{len(rows)} kernels compiled from {len(options.settings)} settings, {len(faults)} faults")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
