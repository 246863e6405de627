"""Compile the library that computes few rows on an x86-64 CPU, in a few seconds, with the compiler alone.

    xmoe native

scripts/setup.sh runs this. Without the library everything works with torch's own operators (rows.py). The library calls
the OpenMP that torch brings, so that there is one pool of threads and no link to a torch version.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
# Only explicit fused multiply-adds are allowed, so that every instruction set gives the same numbers.
# GCC 12 takes the undefined registers of its own AVX-512 header for uninitialised variables.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wall", "-Wno-maybe-uninitialized"]
UNITS: dict[str, tuple[str, ...]] = {
    "rows.cpp": (),
    "rows_avx2.cpp": ("-mavx2", "-mfma"),
    "rows_avx512.cpp": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
}


def library_file() -> Path:
    """The path of these sources' library; changed sources have another one, so that no old build is loaded."""
    digest = hashlib.sha256(repr((FLAGS, UNITS)).encode())
    for name in ("rows.h", "rows_body.h", *UNITS):
        digest.update((SOURCES / name).read_bytes())
    return SOURCES / f"rows-{digest.hexdigest()[:12]}.so"


def build() -> Path:
    """Compile the library and move it to its path; builds of other sources are removed.

    Raises:
        RuntimeError: no x86-64, no compiler, or it failed; with the reason.
    """
    target = library_file()
    if target.exists():
        return target
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
        raise RuntimeError(f"the library is for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++); install one or name it in CXX")
    with tempfile.TemporaryDirectory(dir=SOURCES, prefix=".build-") as folder:
        objects = [Path(folder, name).with_suffix(".o") for name in UNITS]
        compiling = [
            _start([*compiler.split(), *FLAGS, *flags, "-c", str(SOURCES / name), "-o", str(made)])
            for (name, flags), made in zip(UNITS.items(), objects, strict=True)
        ]
        for process in compiling:
            _finish(process)
        made = Path(folder, target.name)
        _finish(_start([*compiler.split(), "-shared", *map(str, objects), "-o", str(made)]))
        made.replace(target)
    for old in SOURCES.glob("rows-*.so"):
        if old != target:
            old.unlink()
    return target


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the compiler ended with {process.returncode}:\n{output[-2000:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit: 0 built, 1 not built; the reason is on standard error."""
    # not command_line.py's parser: the layer uses nothing of the package around it
    argparse.ArgumentParser(prog="xmoe native", description=__doc__.splitlines()[0]).parse_args(argv)
    try:
        print(build())
    except (RuntimeError, OSError) as error:
        print(f"not built, torch's own operators are used: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
