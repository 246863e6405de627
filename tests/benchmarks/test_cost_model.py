"""The calculator against the real model and sums done by hand; counted bytes: tests/moe/experts/test_ranks.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cost_formulas import (
    NODES,
    Model,
    break_even_tokens,
    exchange_bytes,
    memory,
    remote_copies,
    seconds_per_update,
)

ROOT = Path(__file__).parents[2]


def test_expert_parameters_are_those_of_the_layers() -> None:
    from xmoe_fairseq.moe import MoEConfig, MoELayer

    layer = MoELayer(MoEConfig(embed_dim=16, num_experts=4, expert_dim=24))
    model = Model(embed_dim=16, num_experts=4, expert_dim=24, moe_encoder=2, moe_decoder=1)
    assert model.expert_parameters == 3 * sum(parameter.numel() for parameter in layer.experts.parameters())


def test_break_even_is_where_both_take_the_same_time() -> None:
    model = Model(num_experts=16)
    for ranks in (4, 16):
        tokens = break_even_tokens(model, NODES[0], ranks)
        times = [seconds_per_update(model, NODES[0], ranks, tokens, parallel=parallel) for parallel in (False, True)]
        assert times[0] == pytest.approx(times[1])


def test_one_row_by_hand() -> None:
    # width 512 in bf16: 1024 bytes four times, a weight and its gradient of 4 bytes; 2 ranks swap counts of 8 experts
    assert exchange_bytes(1, embed_dim=512, num_experts=8, ranks=2, value_bytes=2) == 4 * 1024 + 8 + 64
    assert exchange_bytes(1, embed_dim=512, num_experts=8, ranks=2, value_bytes=2, backward=False) == 2 * 1024 + 4 + 64


def test_spreading_divides_the_expert_states() -> None:
    model = Model()
    replicated, spread = (memory(model, 8, 1024, parallel=parallel) for parallel in (False, True))
    saved = model.expert_parameters * 7 / 8
    assert replicated.weights - spread.weights == pytest.approx(4 * saved)
    assert replicated.optimizer - spread.optimizer == pytest.approx(8 * saved)


def test_remote_copies_by_hand() -> None:
    # two rows, two nodes: both on one node half of the time, so 1.5 nodes on average, half of them remote
    assert remote_copies(2, 2, once_per_node=True) == pytest.approx(0.75)
    assert remote_copies(2, 2, once_per_node=False) == pytest.approx(1.0)


def test_ranks_that_do_not_divide_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.cost_model", "--num-experts", "64", "--ranks", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--ranks 3 does not divide --num-experts 64" in done.stderr
