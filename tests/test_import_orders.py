"""What importing the package does, in every order of imports."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REGISTERED = (
    "from fairseq.models import ARCH_CONFIG_REGISTRY as archs;"
    "from fairseq.criterions import CRITERION_REGISTRY as criterions;"
    "assert 'xmoe_transformer' in archs and 'xmoe_transformer_as_official' in archs;"
    "assert 'label_smoothed_cross_entropy_with_load_balance' in criterions"
)
needs_fairseq = pytest.mark.skipif(find_spec("fairseq") is None, reason="fairseq is not installed")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_layer_imports_neither_fairseq_nor_the_compiler():
    result = run(
        "import sys, torch; from xmoe_fairseq.moe import MoEConfig, MoELayer;"
        "MoELayer(MoEConfig(8, 4, 8))(torch.randn(5, 1, 8))[0].sum().backward();"
        "sys.exit('fairseq' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    assert result.returncode == 0, result.stderr


def test_checkpoints_of_fairseq_load_safely_without_fairseq(tmp_path):
    result = run(
        "import argparse, sys, torch, xmoe_fairseq;"
        f"torch.save({{'args': argparse.Namespace(a=1)}}, r'{tmp_path}/x.pt');"
        f"assert torch.load(r'{tmp_path}/x.pt', weights_only=True)['args'].a == 1;"
        "sys.exit('fairseq' in sys.modules)"
    )
    assert result.returncode == 0, result.stderr


def test_commands_that_read_files_alone_do_not_wait_for_fairseq():
    modules = "eval.run_report, eval.lm_report, data_prep.lengths, xmoe_fairseq.checkpoints.average"
    result = run(f"import sys, {modules}, xmoe_fairseq.checkpoints.inspect; sys.exit('fairseq' in sys.modules)")
    assert result.returncode == 0, result.stderr


@needs_fairseq
def test_the_garbage_collector_works_after_the_import():
    assert run("import gc, xmoe_fairseq, fairseq; assert gc.isenabled()").returncode == 0


@needs_fairseq
@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import xmoe_fairseq, fairseq",
        "import fairseq, xmoe_fairseq",
        "import importlib.util; import xmoe_fairseq; importlib.util.find_spec('fairseq'); import fairseq.trainer",
        "import xmoe_fairseq.models.layers",
        "import xmoe_fairseq.criterions.load_balance",
        "import xmoe_fairseq.optim.fused_adam",
        "import xmoe_fairseq.checkpoints.structure",
        "import xmoe_fairseq.checkpoints.official",
        "import xmoe_fairseq.patches.checkpoint_files",
    ],
)
def test_everything_is_registered_whatever_is_imported_first(first):
    result = run(f"{first};{REGISTERED}")
    assert result.returncode == 0, result.stderr
