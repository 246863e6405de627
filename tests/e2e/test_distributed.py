"""Training on 2 and 4 Gloo ranks against one process; one checkpoint for any number of ranks; resume; a killed rank."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cost_formulas import Model, legacy_ddp_elements
from xmoe_fairseq.checkpoints.files import load_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[2]
ROUTERS: dict[str, list[str]] = {
    "threshold": [],
    "top_k": ["--moe-router", "top_k", "--moe-top-k", "2"],
    "adamoe": ["--moe-router", "adamoe", "--moe-top-k", "2", "--moe-null-experts", "2"],
    "base": ["--moe-router", "base"],
}
LEGACY = ["--ddp-backend", "legacy_ddp"]
TORCH_DDP = ["--ddp-backend", "pytorch_ddp"]
PARALLEL = "--moe-expert-parallel"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
# Everything random is on: dropout, Gumbel noise of the router. The epoch ends after 3 updates.
TRAIN = shlex.split(
    "--arch xmoe_transformer_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --moe-expert-dim 8 "
    "--moe-num-experts 8 --moe-router top_k --moe-top-k 2 --moe-router-noise gumbel --dropout 0.1 "
    "--criterion label_smoothed_cross_entropy_with_load_balance --optimizer adam --lr 0.01 --clip-norm 1 --cpu "
    "--seed 3 --update-freq 2 --num-workers 0 --save-interval-updates 2 --update-epoch-batch-itr True --log-interval 1 "
    "--log-format simple --ddp-backend legacy_ddp --required-batch-size-multiple 1"
)


def write_corpus(folder: Path) -> None:
    """48 training pairs: the target is the source reversed."""
    draw = random.Random(1)
    words = [f"w{index}" for index in range(20)]
    for split, lines in (("train", 48), ("valid", 6)):
        sources = [draw.choices(words, k=draw.randint(2, 9)) for _ in range(lines)]
        (folder / f"{split}.a").write_text("".join(" ".join(line) + "\n" for line in sources))
        (folder / f"{split}.b").write_text("".join(" ".join(reversed(line)) + "\n" for line in sources))


def comparison_jobs() -> list[dict[str, Any]]:
    """The same five updates on 1, 2 and 4 ranks, experts replicated and spread."""
    one, two, four = ([{"name": name, "flags": flags} for name, flags in ROUTERS.items()] for _ in range(3))
    # BASE layers balance within each rank's batch, so one process must do likewise: a micro-batch for each share
    one = [case for case in one if case["name"] != "base"]
    one += [{"name": f"base/{parts}", "flags": ROUTERS["base"], "micro_batches": parts} for parts in (2, 4)]
    for cases in (two, four):
        cases += [{"name": f"{name}/parallel", "flags": [*flags, PARALLEL]} for name, flags in ROUTERS.items()]
        for case in cases:
            case["flags"] = [*case["flags"], *LEGACY]
    two += [
        {"name": "threshold/ddp", "flags": TORCH_DDP},
        {"name": "threshold/ddp/parallel", "flags": [*TORCH_DDP, PARALLEL]},
        {"name": "micro", "flags": LEGACY, "micro_batches": 2},
        {"name": "micro/parallel", "flags": [*LEGACY, PARALLEL], "micro_batches": 2},
    ]
    return [{"name": str(world), "world": world, "cases": cases} for world, cases in ((1, one), (2, two), (4, four))]


def train_job(folder: Path, name: str, world: int, updates: int, save_dir: str) -> dict[str, Any]:
    """``world`` ranks of 8 / world sentences each."""
    arguments = [str(folder / "bin"), "--user-dir", str(ROOT / "xmoe_fairseq"), *TRAIN, PARALLEL]
    arguments += ["--batch-size", str(8 // world), "--max-update", str(updates), "--save-dir", str(folder / save_dir)]
    return {"name": name, "world": world, "command": "train", "arguments": arguments}


def command_jobs(folder: Path) -> list[dict[str, Any]]:
    prefix = [f"--{split}pref={folder / split}" for split in ("train", "valid")]
    bin_dir = str(folder / "bin")
    arguments = ["-s", "a", "-t", "b", *prefix, "--destdir", bin_dir, "--joined-dictionary"]
    jobs = [{"name": "preprocess", "world": 1, "command": "preprocess", "arguments": arguments}]
    for world in (1, 2):
        jobs += [
            train_job(folder, f"whole{world}", world, 6, f"whole{world}"),
            train_job(folder, f"first{world}", world, 4, f"resumed{world}"),  # ends in the middle of the second epoch
            train_job(folder, f"second{world}", world, 6, f"resumed{world}"),
        ]
    start = folder / "whole1" / "checkpoint_last.pt"
    positions = ["--max-source-positions", "1024", "--max-target-positions", "1024"]
    relay = {"flags": [*TRAIN, PARALLEL, *positions], "dictionary": str(folder / "bin" / "dict.a.txt")}
    for world in (2, 4, 1):
        end = folder / f"relayed{world}.pt"
        jobs.append({"name": f"relay{world}", "world": world, "relay": [str(start), str(end)], **relay})
        start = end
    for name, path in (("start", folder / "whole1" / "checkpoint_last.pt"), ("end", start)):
        arguments = [bin_dir, "--user-dir", str(ROOT / "xmoe_fairseq"), "--path", str(path), "--gen-subset", "valid"]
        arguments += ["--cpu", "--beam", "2", "--max-len-b", "20", "--required-batch-size-multiple", "1"]
        jobs.append({"name": f"generate-{name}", "world": 1, "command": "generate", "arguments": arguments})
    return jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything has been run, in one program."""
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder)
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps(comparison_jobs() + command_jobs(folder)))
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(jobs), str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=450, check=False)
    logs = "".join(f"\n{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("*.0.log")))
    assert done.returncode == 0, done.stderr[-4000:] + logs
    return folder


def results(folder: Path, world: int) -> dict[str, Any]:
    return torch.load(folder / f"{world}.pt", weights_only=True)


def relative_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def assert_same_training(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Losses, gradient norms, parameters and Adam's first moments to 1e-6 of their size."""
    for figure in ("loss", "gnorm"):
        assert got[figure] == pytest.approx(want[figure], rel=1e-6)
    assert got["model"].keys() == want["model"].keys()
    for name, value in want["model"].items():
        assert relative_difference(got["model"][name], value) < 1e-6, name
    assert got["optimizer"].keys() == want["optimizer"].keys()
    for position, slots in want["optimizer"].items():
        difference = (got["optimizer"][position]["exp_avg"] - slots["exp_avg"]).norm()
        assert difference < 1e-6, position  # the gradients were clipped to a norm of 0.5


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("experts", ["", "/parallel"])
def test_ranks_train_as_one_process(folder: Path, router: str, world: int, experts: str) -> None:
    want = results(folder, 1)[f"base/{world}" if router == "base" else router]
    assert min(want["gnorm"]) > 0.5  # clipping is at work in every update, so it is compared as well
    assert_same_training(results(folder, world)[router + experts], want)


def test_torch_ddp_needs_no_search_for_unused_parameters(folder: Path) -> None:
    want, got = results(folder, 1)["threshold"], results(folder, 2)
    assert_same_training(got["threshold/ddp"], want)
    assert_same_training(got["threshold/ddp/parallel"], want)


def test_expert_parallel_accumulates_over_micro_batches(folder: Path) -> None:
    got = results(folder, 2)
    assert_same_training(got["micro/parallel"], got["micro"])


def test_gradients_sent_by_four_ranks_are_those_of_the_cost_model(folder: Path) -> None:
    got = results(folder, 4)
    sizes = {name: value.numel() for name, value in got["threshold"]["model"].items() if not name.endswith("version")}
    sizes = {name: size for name, size in sizes.items() if "positions._float_tensor" not in name}  # no parameter
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    shared = sum(sizes.values()) - experts
    size = Model(16, 32, 2, 2, 1, 1, num_experts=8, expert_dim=8, vocabulary=3 * 34)  # three embeddings, not shared
    assert (shared, experts) == (size.shared_parameters, size.expert_parameters)
    assert got["threshold"]["reduced"] == [legacy_ddp_elements(shared + experts, shared + experts)] * 5
    assert got["threshold/parallel"]["reduced"] == [legacy_ddp_elements(shared, shared + experts // 4)] * 5


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Bit for bit: weights, optimiser state, number of updates."""
    got, want = load_checkpoint(one), load_checkpoint(other)
    assert got["optimizer_history"][-1]["num_updates"] == want["optimizer_history"][-1]["num_updates"]
    assert got["model"].keys() == want["model"].keys()
    for name, value in want["model"].items():
        assert torch.equal(got["model"][name], value), name
    states = [state["last_optimizer_state"]["state"] for state in (got, want)]
    assert states[0].keys() == states[1].keys()
    for position, slots in states[1].items():
        for name, value in slots.items():
            same = torch.equal(states[0][position][name], value) if torch.is_tensor(value) else True
            assert same, (position, name)


@pytest.mark.parametrize("world", [1, 2])
def test_resume_in_mid_epoch_is_bit_equal(folder: Path, world: int) -> None:
    whole, resumed = folder / f"whole{world}", folder / f"resumed{world}"
    log = (folder / f"second{world}.0.log").read_text()
    assert "(epoch 2 @ 4 updates)" in log
    assert_same_checkpoint(resumed / "checkpoint_last.pt", whole / "checkpoint_last.pt")


def test_checkpoint_goes_from_1_to_2_to_4_to_1_ranks_unchanged(folder: Path) -> None:
    start = folder / "whole1" / "checkpoint_last.pt"
    for world in (2, 4, 1):
        assert_same_checkpoint(folder / f"relayed{world}.pt", start)
    first, last = ((folder / f"generate-{name}.0.log").read_text() for name in ("start", "end"))
    hypotheses = re.findall(r"^H-.*$", first, re.MULTILINE)
    assert len(hypotheses) == 6
    assert hypotheses == re.findall(r"^H-.*$", last, re.MULTILINE)


def wait_for(path: Path, pattern: str, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = re.search(pattern, path.read_text())
        if found:
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"{pattern} did not appear within {seconds} s:\n{path.read_text()[-3000:]}")


@contextmanager
def two_ranks(folder: Path, updates: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher script at work; it and its ranks are gone after the block."""
    arguments = train_job(folder, "", 2, updates, "killed")["arguments"]
    command = ["bash", str(ROOT / "scripts" / "train_multi.sh"), "--ranks", "2", "--", *arguments]
    environment = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log.open("wb") as output:
        run = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield run
    finally:
        run.terminate()
        run.wait(30)


def test_killed_rank_ends_the_others_and_the_run_resumes(folder: Path) -> None:
    log = folder / "killed.log"
    with two_ranks(folder, 100_000, log) as run:
        wait_for(log, r"Saved checkpoint \S+checkpoint_2_4\.pt", 120)
        victim = int(wait_for(log, r"rank 1 is process (\d+)", 1).split()[-1])
        os.kill(victim, signal.SIGKILL)
        assert run.wait(60) == 137
    said = log.read_text()
    assert "error: rank 1 ended with code 137" in said
    assert re.search(r"rank0.*(Connection|peer|closed)", said)  # the survivor says why it ends, too
    updates = load_checkpoint(folder / "killed" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]
    log = folder / "resumed.log"
    with two_ranks(folder, updates + 1, log) as run:
        assert run.wait(150) == 0, log.read_text()[-3000:]
    assert f"@ {updates} updates)" in log.read_text()
