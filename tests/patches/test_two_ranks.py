"""fairseq's trainer on two ranks with Gloo on the CPU. Run as a program, this file is the ranks."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from fairseq.logging import metrics  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402

from tests.e2e import ranks  # noqa: E402
from xmoe_fairseq.checkpoints.files import load_checkpoint  # noqa: E402
from xmoe_fairseq.patches import signals  # noqa: E402

pytestmark = pytest.mark.e2e
WORDS = ranks.dictionary()
SMALL = shlex.split("--encoder-layers 1 --decoder-layers 1 --moe-interval 1 --ddp-backend legacy_ddp")
PARALLEL = "--moe-expert-parallel"


def trainer(*flags: str, rank: int | None = None) -> Trainer:
    """Of this rank, or of the one process to compare with (``rank=0``)."""
    metrics.reset()
    flags = (*SMALL, "--save-dir", tempfile.gettempdir(), *flags)
    return ranks.build(list(flags), dist.get_rank() if rank is None else rank, 2 if rank is None else 1, WORDS)


def update(trainer: Trainer, *samples: Any) -> None:
    with metrics.aggregate(new_root=True):
        trainer.train_step(list(samples))


def share(number: int) -> Any:
    return ranks.share(number, WORDS, dist.get_rank(), 2)


def same_on_both(value: torch.Tensor) -> bool:
    both = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(both, value.contiguous())
    return torch.equal(*both)


def check_overflow_on_one_rank() -> None:
    """With an infinite gradient in an expert of rank 1 both ranks skip the update and halve the scale."""
    run = trainer(PARALLEL, "--amp", "--amp-batch-retries", "1")
    update(run, share(0))
    expert = next(parameter for parameter in run.get_model().parameters() if hasattr(parameter, "expert"))
    if dist.get_rank() == 1:
        handle = expert.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, torch.inf))[1])
    update(run, share(1))
    assert run.optimizer.scaler.get_scale() == 64, run.optimizer.scaler.get_scale()
    assert run.get_num_updates() == 2  # tried again
    update(run, share(2))
    for name, parameter in run.get_model().named_parameters():
        assert parameter.isfinite().all(), name
        assert hasattr(parameter, "expert") or same_on_both(parameter.detach()), name


def router_gradients(run: Trainer, *samples: Any) -> dict[str, torch.Tensor]:
    """Of one update, as the optimiser sees them."""
    seen: dict[str, torch.Tensor] = {}

    def keep(*_args: Any, **_kwargs: Any) -> None:
        named = run.get_model().named_parameters()
        seen.update(
            {name: p.grad.clone() for name, p in named if name.endswith("router.weight") and p.grad is not None}
        )

    run.optimizer.step = keep
    update(run, *samples)
    assert seen
    return seen


def check_dummy_batch() -> None:
    """Rank 1 has no batch left: the router's gradient is that of rank 0's batch alone."""
    flags = ("--balance-loss-weight", "10")  # the balance loss is what the load is for
    run = trainer(*flags)
    run.reset_dummy_batch(ranks.share(5, WORDS, 1, 2))
    got = router_gradients(run, ranks.share(0, WORDS, 0, 2) if dist.get_rank() == 0 else None)
    want = router_gradients(trainer(*flags, rank=0), ranks.share(0, WORDS, 0, 2))
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def check_layer_drop() -> None:
    """Each rank drops layers of its own, all of them at times: the vectors that are added up keep their length."""
    run = trainer(
        "--encoder-layers", "3", "--encoder-layerdrop", "0.5", "--decoder-layerdrop", "0.5", "--dropout", "0.1"
    )
    ran = []
    for module in run.get_model().modules():
        if type(module).__name__ == "MoELayer":
            module.register_forward_hook(lambda module, *_: ran.append(id(module)))
    differs = 0
    for number in range(6):
        ran.clear()
        update(run, share(number))
        count = torch.tensor([len(ran)])
        differs += not same_on_both(count)
    assert differs  # otherwise this test would check nothing
    assert run.get_num_updates() == 6
    assert all(same_on_both(parameter.detach()) for parameter in run.get_model().parameters())


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))


def check_loading(folder: Path) -> None:
    """Rank 1 receives its half of the experts and of their moments, bit for bit, and nothing of the other half."""
    first = trainer(PARALLEL, "--moe-expert-dim", "64")
    update(first, share(0))
    first.consolidate_optimizer()
    path = str(folder / "spread.pt")
    first.save_checkpoint(path, {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1, "version": 2}})
    dist.barrier()
    second = trainer(PARALLEL, "--moe-expert-dim", "64", "--seed", "8")
    received = 0
    stock = {name: getattr(dist, name) for name in ("broadcast", "scatter")}

    def counting(name: str) -> Any:
        def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal received
            received += tensor.nbytes
            return stock[name](tensor, *args, **kwargs)

        return count

    for name in stock:
        setattr(dist, name, counting(name))
    try:
        second.load_checkpoint(path)
    finally:
        for name, function in stock.items():
            setattr(dist, name, function)
    for name, parameter in first.get_model().named_parameters():
        loaded = dict(second.get_model().named_parameters())[name]
        assert torch.equal(loaded, parameter), name
        state = [run.optimizer.optimizer.state[p] for run, p in ((first, parameter), (second, loaded))]
        assert state[0].keys() == state[1].keys()
        assert all(torch.equal(state[0][slot], state[1][slot]) for slot in ("exp_avg", "exp_avg_sq")), name
    kept = 3 * nbytes(second.get_model().parameters())  # weights and two moments of this rank
    other_half = 3 * nbytes(p for p in second.get_model().parameters() if hasattr(p, "expert"))
    assert kept < received < kept + other_half / 4, (kept, received, other_half)


def check_signal(folder: Path) -> None:
    """Rank 1 alone is told to stop: both save together and leave with the code that says so."""
    run = trainer(PARALLEL, "--save-dir", str(folder))
    update(run, share(0))
    signals._received = signal.SIGUSR1 if dist.get_rank() == 1 else None
    place = argparse.Namespace(state_dict=lambda: {"epoch": 1, "iterations_in_epoch": 1, "version": 2})
    with pytest.raises(SystemExit) as stop:
        signals._validate_and_save(lambda *_: ([None], False), run.cfg, run, run.task, place, ["valid"], False)
    assert stop.value.code == signals.SAVED
    signals._received = None
    assert (folder / signals.MARKER).read_text() == "update 1\n"
    state = load_checkpoint(folder / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 1
    assert state["model"]["encoder.layers.0.moe.experts.w1"].size(0) == 8  # of both ranks


def check_one_rank_raises() -> None:
    """Rank 1's criterion raises in a forward pass: it ends with that error, and rank 0 does not wait for it."""
    run = trainer(PARALLEL)
    update(run, share(0))
    if dist.get_rank() == 1:
        run.criterion.forward = lambda *_args, **_kwargs: (_ for _ in ()).throw(ValueError("a broken sentence"))
    update(run, share(1))


def run_rank(rank: int, folder: str, question: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if question == "raise":
        return check_one_rank_raises()
    check_overflow_on_one_rank()
    check_dummy_batch()
    check_layer_drop()
    check_loading(Path(folder))
    check_signal(Path(folder))
    dist.barrier()
    dist.destroy_process_group()
    return None


def run_ranks(folder: Path, question: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(folder), question]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_overflow_dummy_batch_layer_drop_loading_and_a_signal(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, "agree", 200)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.timeout(150)
def test_a_rank_that_raises_ends_the_others(tmp_path: Path) -> None:
    done = run_ranks(tmp_path, "raise", 100)
    assert done.returncode != 0
    assert "ValueError: a broken sentence" in done.stderr


if __name__ == "__main__":
    from torch.multiprocessing import start_processes

    ranks.configuration([], 0, 1)  # imports the package before the forks
    start_processes(run_rank, (sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")
