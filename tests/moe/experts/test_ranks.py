"""Experts spread over ranks against replicated ones. Run as a program, this file is the ranks: forks of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.cost_formulas import exchange_bytes  # noqa: E402
from xmoe_fairseq.moe import MoEConfig, MoELayer  # noqa: E402
from xmoe_fairseq.moe.experts.ranks import WEIGHTS, ParallelExperts, gather_experts, local_slice, num_ranks  # noqa: E402

WIDTH, EXPERTS, HIDDEN, TOKENS = 8, 8, 12, 24


def build(parallel: bool, **settings: object) -> MoELayer:
    torch.manual_seed(0)
    fields = {"router": "top_k", "top_k": 2, "capacity_factor": None, **settings}
    return MoELayer(MoEConfig(WIDTH, EXPERTS, HIDDEN, expert_parallel=parallel, **fields))


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and output gradient of a rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    x, grad = torch.randn(2, TOKENS, WIDTH, generator=generator).unbind()
    return x.requires_grad_(), grad


def check_equal(name: str, **settings: object) -> None:
    """Outputs, input gradients and router gradients of each rank; expert gradients as a mean over ranks."""
    rank, world = dist.get_rank(), num_ranks()
    padding = torch.zeros(TOKENS, dtype=torch.bool)
    if name == "a rank of padding alone":
        padding[:] = rank == world - 1
    spread, whole = build(True, **settings), build(False, **settings)
    if name == "all rows to the first rank":
        with torch.no_grad():
            for layer in (spread, whole):
                layer.router.weight.zero_()  # ties go to the lowest experts
    x, grad = batch(rank)
    y, plan = spread(x, padding)
    y.backward(grad)
    x_whole, _ = batch(rank)
    y_whole, plan_whole = whole(x_whole, padding)
    y_whole.backward(grad)
    assert torch.equal(plan.count_E, plan_whole.count_E)
    torch.testing.assert_close(y, y_whole)
    torch.testing.assert_close(x.grad, x_whole.grad)
    torch.testing.assert_close(spread.router.weight.grad, whole.router.weight.grad)
    for weight in WEIGHTS:
        mean = getattr(whole.experts, weight).grad.clone()
        dist.all_reduce(mean)
        held = spread.experts.held
        torch.testing.assert_close(getattr(spread.experts, weight).grad, mean[held] / world, msg=f"{name}: {weight}")


def check_state() -> None:
    spread, whole = build(True), build(False)
    for parameter in spread.parameters():
        torch.nn.init.zeros_(parameter)
    spread.load_state_dict(whole.state_dict())  # every rank takes its slice of one checkpoint
    gathered = {weight: gather_experts(getattr(spread.experts, weight)) for weight in WEIGHTS}
    for weight, value in gathered.items():
        if dist.get_rank() == 0:
            assert torch.equal(value, getattr(whole.experts, weight))
        else:
            assert value is None


def check_bytes(autocast: bool) -> None:
    """The bytes that ranks send in a forward and backward pass equal the cost model's."""
    rank, world = dist.get_rank(), num_ranks()
    leaving = 0
    stock = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, received: object = None, sent: list[int] | None = None) -> object:
        nonlocal leaving
        rows = sent or [given.size(0) // world] * world
        leaving += (sum(rows) - rows[rank]) * given[:1].nbytes if sum(rows) else 0
        return stock(output, given, received, sent)

    layer = build(True)
    x, grad = batch(rank)
    dist.all_to_all_single = counting
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, plan = layer(x)
        y.backward(grad)
    finally:
        dist.all_to_all_single = stock
    rows = plan.count_E.sum() - plan.count_E[layer.experts.held].sum()
    counted = torch.tensor([leaving, int(rows)])
    dist.all_reduce(counted)
    value_bytes = 2 if autocast else 4
    shape = {"embed_dim": WIDTH, "num_experts": EXPERTS, "ranks": world, "value_bytes": value_bytes}
    assert int(counted[0]) == exchange_bytes(int(counted[1]), **shape)


def run_rank(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    check_equal("top-2")
    check_equal("threshold", router="threshold", top_k=None)
    check_equal("with capacity", capacity_factor=1.0)
    check_equal("a rank of padding alone")
    check_equal("all rows to the first rank")
    for path in ("bmm", "loop", "masked", "grouped"):
        check_equal(path, compute=path)
    if world == 2 and find_spec("triton") and not torch.cuda.is_available():
        check_equal("triton", compute="triton")  # in its interpreter (tests/conftest.py)
    check_state()
    check_bytes(autocast=False)
    check_bytes(autocast=True)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_spread_experts_equal_replicated_ones(world: int, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(world), str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_one_process_holds_all_experts() -> None:
    layer = build(True)
    assert not isinstance(layer.experts, ParallelExperts)
    assert layer.experts.w1.size(0) == EXPERTS


def test_experts_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmoe_fairseq.moe.experts.ranks.num_ranks", lambda: 3)
    with pytest.raises(ValueError, match=r"moe_num_experts \(8\) must be a multiple .* ranks \(3\).*9 experts"):
        local_slice(8)


def test_merged_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moe_merge_experts .*leave moe_expert_parallel out"):
        build(True, merge_experts=True)


if __name__ == "__main__":
    from torch.multiprocessing import start_processes

    start_processes(run_rank, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]), start_method="fork")
