"""Training jobs of several ranks within one program, so that fairseq is imported once: the ranks are forks.

    python tests/e2e/ranks.py JOBS.json OUT_DIR

JOBS.json lists jobs, run one after the other, each {"name": ..., "world": number of ranks} and one of

    "cases": [{"name": ..., "flags": [...], "micro_batches": 1}, ...]
        fairseq's own Trainer on made-up sentences. Each update has the same eight sentences whatever the number of
        ranks; rank r takes the r-th share. OUT_DIR/NAME.pt maps the name of a case to losses and gradient norms of
        every update, and the state that Trainer would save.
    "relay": [FROM, TO], "flags": [...], "dictionary": FILE
        Trainer loads the checkpoint FROM and saves it as TO.
    "command": "train" (or preprocess, generate), "arguments": [...]
        the stock command; its output goes to OUT_DIR/NAME.RANK.log.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimiser of a process imports it, which takes a second: once for all forks
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from fairseq import options, utils
from fairseq.data import Dictionary
from fairseq.data.language_pair_dataset import collate
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.models import distributed_fairseq_model
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

UPDATES = 5
SENTENCES = 8
VOCABULARY = 30
SIZES = shlex.split(
    "--task translation -s a -t b --arch xmoe_transformer_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 "
    "--moe-expert-dim 8 --moe-num-experts 8 --moe-capacity-factor none --dropout 0 --max-source-positions 32 "
    "--max-target-positions 32 --criterion label_smoothed_cross_entropy_with_load_balance --label-smoothing 0.1 "
    "--optimizer adam --adam-eps 1e-4 --lr 0.01 --lr-scheduler fixed --clip-norm 0.5 --cpu --seed 3"
)


def dictionary() -> Dictionary:
    words = Dictionary()
    for index in range(VOCABULARY):
        words.add_symbol(f"w{index}")
    return words


def configuration(flags: list[str], rank: int, world: int) -> Any:
    user_dir = str(Path(__file__).parents[2] / "xmoe_fairseq")
    where = ["--distributed-world-size", str(world), "--distributed-rank", str(rank), "--distributed-no-spawn"]
    arguments = ["unused", "--user-dir", user_dir, *SIZES, *where, *flags]
    parser = options.get_training_parser()
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))


def sentences(update: int, words: Dictionary) -> list[dict[str, Any]]:
    """The global batch of one update, with lengths from 3 to 9."""
    generator = torch.Generator().manual_seed(update)
    pairs = []
    for index in range(SENTENCES):
        source, target = (
            torch.cat([torch.randint(4, len(words), (int(length),), generator=generator), torch.tensor([words.eos()])])
            for length in torch.randint(3, 10, (2,), generator=generator)
        )
        pairs.append({"id": index, "source": source, "target": target})
    return pairs


def batch(pairs: list[dict[str, Any]], words: Dictionary) -> dict[str, Any]:
    return collate(pairs, pad_idx=words.pad(), eos_idx=words.eos(), left_pad_source=True)


def share(update: int, words: Dictionary, rank: int, parts: int) -> dict[str, Any]:
    each = SENTENCES // parts
    return batch(sentences(update, words)[rank * each : (rank + 1) * each], words)


def build(flags: list[str], rank: int, world: int, words: Dictionary) -> Trainer:
    cfg = configuration(flags, rank, world)
    utils.set_torch_seed(cfg.common.seed)
    task = TranslationTask(cfg.task, words, words)
    model = task.build_model(cfg.model)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def count_reduced(trainer: Trainer) -> list[int]:
    """Elements that each coming call of the optimiser's all-reduce of gradients hands to torch.distributed."""
    counts: list[int] = []
    reduce_grads, all_reduce = trainer.optimizer.all_reduce_grads, dist.all_reduce

    def counting(module: Any) -> None:
        counts.append(0)

        def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[-1] += tensor.numel()
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = count
        try:
            reduce_grads(module)
        finally:
            dist.all_reduce = all_reduce

    trainer.optimizer.all_reduce_grads = counting
    return counts


def run_case(case: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    metrics.reset()
    words = dictionary()
    trainer = build(case["flags"], rank, world, words)
    micro_batches = case.get("micro_batches", 1)
    result: dict[str, Any] = {"loss": [], "gnorm": [], "reduced": count_reduced(trainer)}
    for update in range(UPDATES):
        parts = world * micro_batches
        samples = [share(update, words, rank * micro_batches + index, parts) for index in range(micro_batches)]
        with metrics.aggregate(new_root=True) as logged:
            trainer.train_step(samples)
        for name in ("loss", "gnorm"):
            result[name].append(float(logged[name].avg))  # not rounded, as shown values are
    trainer.consolidate_optimizer()
    if rank == 0:
        state = trainer.state_dict()
        result["model"], result["optimizer"] = state["model"], state["last_optimizer_state"]["state"]
    return result


def join(rank: int, job: dict[str, Any], out_dir: Path) -> None:
    if job["world"] > 1:
        store = f"file://{out_dir}/{job['name']}.store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job["world"])


def leave() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run_cases(rank: int, job: dict[str, Any], out_dir: Path) -> None:
    # stock fairseq hands DDP a device index, which DDP refuses for CPU models
    ddp = functools.partial(DistributedDataParallel, device_ids=None, output_device=None)
    distributed_fairseq_model.DistributedDataParallel = lambda device_ids, output_device, **rest: ddp(**rest)
    join(rank, job, out_dir)
    results = {}
    for case in job["cases"]:
        try:
            results[case["name"]] = run_case(case, rank, job["world"])
        except Exception as error:
            raise RuntimeError(f"case {case['name']} on rank {rank}") from error
    if rank == 0:
        torch.save(results, out_dir / f"{job['name']}.pt")
    leave()


def run_relay(rank: int, job: dict[str, Any], out_dir: Path) -> None:
    join(rank, job, out_dir)
    trainer = build(job["flags"], rank, job["world"], Dictionary.load(job["dictionary"]))
    extra_state = trainer.load_checkpoint(job["relay"][0])
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(job["relay"][1], extra_state)
    leave()


def run_command(rank: int, job: dict[str, Any], out_dir: Path) -> None:
    arguments = list(job["arguments"])
    if job["world"] > 1:
        arguments += ["--distributed-world-size", str(job["world"]), "--distributed-rank", str(rank)]
        arguments += ["--distributed-init-method", f"file://{out_dir}/{job['name']}.store"]
        arguments += ["--distributed-backend", "gloo", "--distributed-no-spawn"]
    with open(out_dir / f"{job['name']}.{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.argv = [f"fairseq-{job['command']}", *arguments]
        importlib.import_module(f"fairseq_cli.{job['command']}").cli_main()


def main() -> None:
    jobs, out_dir = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).resolve()
    torch.set_num_threads(1)
    configuration([], 0, 1)  # imports the package before the forks
    for job in jobs:
        run = run_cases if "cases" in job else run_relay if "relay" in job else run_command
        start_processes(run, (job, out_dir), nprocs=job["world"], start_method="fork")


if __name__ == "__main__":
    main()
