"""Training jobs of several ranks within one program, so that fairseq is imported once: the ranks are forks.

    python tests/e2e/ranks.py JOBS.json OUT_DIR

JOBS.json lists jobs, run one after the other, each {"name": ..., "world": number of ranks} and one of

    "cases": [{"name": ..., "flags": [...], "micro_batches": 1}, ...]
        fairseq's own Trainer on made-up sentences. Each update has the same eight sentences whatever the number of
        ranks; rank r takes the r-th share. OUT_DIR/NAME.pt maps the name of a case to losses and gradient norms of
        every update, and the state that Trainer would save.
    "command": "train" (or preprocess, generate), "arguments": [...]
        the stock command; its output goes to OUT_DIR/NAME.RANK.log.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from fairseq import options, utils
from fairseq.data import Dictionary
from fairseq.data.language_pair_dataset import collate
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from torch.multiprocessing import start_processes

UPDATES = 5
SENTENCES = 8
VOCABULARY = 30
SIZES = (
    "--task translation -s a -t b --arch xmoe_transformer_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 "
    "--moe-expert-dim 8 --moe-num-experts 8 --moe-capacity-factor none --dropout 0 --max-source-positions 32 "
    "--max-target-positions 32 --criterion label_smoothed_cross_entropy_with_load_balance --label-smoothing 0.1 "
    "--optimizer adam --adam-eps 1e-4 --lr 0.01 --lr-scheduler fixed --clip-norm 0.5 --cpu --seed 3"
).split()


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


def build(flags: list[str], rank: int, world: int) -> tuple[Trainer, Dictionary]:
    cfg, words = configuration(flags, rank, world), dictionary()
    utils.set_torch_seed(cfg.common.seed)
    task = TranslationTask(cfg.task, words, words)
    model = task.build_model(cfg.model)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion)), words


def run_case(case: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    metrics.reset()
    trainer, words = build(case["flags"], rank, world)
    micro_batches = case.get("micro_batches", 1)
    result: dict[str, Any] = {"loss": [], "gnorm": []}
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


def run_cases(rank: int, job: dict[str, Any], out_dir: Path) -> None:
    world = job["world"]
    if world > 1:
        store = f"file://{out_dir}/{job['name']}.store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results = {}
    for case in job["cases"]:
        try:
            results[case["name"]] = run_case(case, rank, world)
        except Exception as error:
            raise RuntimeError(f"case {case['name']} on rank {rank}") from error
    if rank == 0:
        torch.save(results, out_dir / f"{job['name']}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


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
        run = run_cases if "cases" in job else run_command
        start_processes(run, (job, out_dir), nprocs=job["world"], start_method="fork")


if __name__ == "__main__":
    main()
