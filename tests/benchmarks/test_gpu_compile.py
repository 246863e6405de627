"""Machine code for GPUs, inspected without one: spills and tensor-core instructions are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_compile, gpu_record

ROOT = Path(__file__).parents[2]
LOOP = """
        /*0000*/  MOV R1, c[0x0][0x28] ;
        /*0010*/  STL [R1], R4 ;
.L_x_0:
        /*0020*/  LDG.E R2, [R4] ;
.L_x_1:
        /*0030*/  HMMA.16816.F32.BF16 R4, R68.reuse, R2, R4 ;
        {inside}
        /*0050*/  @P0 BRA `(.L_x_1) ;
        /*0060*/  LDL R9, [R1+0x4] ;
        /*0070*/  @P1 BRA `(.L_x_0) ;
        /*0080*/  LDL R9, [R1] ;
        /*0090*/  @!P2 BRA `(.L_x_2) ;
.L_x_2:
        /*00a0*/  EXIT ;
"""


def test_only_spills_of_the_innermost_multiplying_loop_are_the_main_loops() -> None:
    """Spills before it, after it and in the loop around it cost little."""
    clean = gpu_compile.inspect_code(LOOP.replace("{inside}", ""))
    assert clean == {"instructions": 10, "tensor_core": 1, "loop_spills": 0}
    spilt = gpu_compile.inspect_code(LOOP.replace("{inside}", "/*0040*/  STL [R1+0x8], R7 ;"))
    assert spilt == {"instructions": 11, "tensor_core": 1, "loop_spills": 1}


def test_a_loop_of_single_multiplications_counts_when_it_is_a_product() -> None:
    def code(products: int) -> str:
        body = "        /*0000*/  FFMA R4, R5, R6, R4 ;\n" * products + "        /*0010*/  LDL R9, [R1] ;\n"
        return f".L_x_3:\n{body}        /*0020*/  BRA `(.L_x_3) ;\n        /*0030*/  NOP;\n"

    assert gpu_compile.inspect_code(code(64)) == {"instructions": 66, "tensor_core": 0, "loop_spills": 1}
    # too few for a product; an address, say
    assert gpu_compile.inspect_code(code(3)) == {"instructions": 5, "tensor_core": 0, "loop_spills": 0}


def test_every_shape_of_the_named_architectures_is_a_setting() -> None:
    pytest.importorskip("fairseq")
    import argparse

    from xmoe_fairseq.models import architectures

    known = {
        (s.config.embed_dim, s.config.num_experts, s.config.expert_dim) for s in gpu_record.named_settings().values()
    }
    from fairseq.models import ARCH_CONFIG_REGISTRY

    for name, size in architectures.ARCHITECTURES.items():
        if name.startswith("dense") or size.embed_dim < 512:
            continue
        args = argparse.Namespace()
        ARCH_CONFIG_REGISTRY[name](args)
        if not getattr(args, "moe_merge_experts", False):
            assert (size.embed_dim, args.moe_num_experts, args.moe_expert_dim) in known, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_a_training_step_compiles_without_faults(arch: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    out = tmp_path / "compile.json"
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "--settings", "64x1024", "--arch", str(arch)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = {row["kernel"]: row for row in json.loads(out.read_text())["rows"]}
    products = ("gate_logits", "expert_up", "rows_times_experts", "hidden_backward", "weight_gradient")
    assert all(rows[name]["tensor_core"] and not rows[name]["loop_spills"] for name in products)
    assert {"route_forward", "select", "place", "by_token", "combine_rows", "route_backward"} <= rows.keys()
    assert all(
        0 < row["registers"] <= 255 and row["shared_KB"] <= gpu_compile.SHARED_LIMIT[arch] / 1024
        for row in rows.values()
    )
