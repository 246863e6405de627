"""A tiny training, interrupted at given moments, within one program: each run is a fork that ends as a killed one does.

    python tests/e2e/interrupted.py JOBS.json

JOBS.json: {"arguments": [...of fairseq-train], "runs": [{"save_dir": ..., "log": ..., "at": 0, "how": "kill"}, ...]}.
A moment is the ``at``-th event of a run (0: none): an update before and after, a validation step, a checkpoint half
written, a copy half made, a file renamed or removed. ``kill`` ends the process there without any clean-up, ``signal``
sends itself SIGUSR1. Prints a JSON list: exit code and number of events of each run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimiser of a process imports it, which takes a second: once for all forks

sys.path.insert(0, str(Path(__file__).parents[2]))

from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

import xmoe_fairseq  # noqa: F401  installs the patches before the forks

KILLED = 9


class Events:
    """Counts events, and ends the process or sends the signal at the chosen one."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count, self.is_training = at, how, 0, False

    def tick(self) -> None:
        if not self.is_training:  # fairseq renames and removes a file to see whether it may write
            return
        self.count += 1
        if self.count == self.at:
            if self.how == "kill":
                os._exit(KILLED)
            os.kill(os.getpid(), signal.SIGUSR1)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return counted

    def update(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        counted = self.around(train_step)

        def first_update_starts_the_count(*args: Any, **kwargs: Any) -> Any:
            self.is_training = True
            return counted(*args, **kwargs)

        return first_update_starts_the_count

    def half_saved(self, obj: Any, file: Any) -> None:
        buffer = io.BytesIO()
        torch.save(obj, buffer)
        half = buffer.tell() // 2
        file.write(buffer.getvalue()[:half])
        file.flush()
        self.tick()
        file.write(buffer.getvalue()[half:])

    def half_copied(self, source: Any, target: Any) -> None:
        data = Path(source).read_bytes()
        Path(target).write_bytes(data[: len(data) // 2])
        self.tick()
        Path(target).write_bytes(data)


def run(arguments: list[str], save_dir: str, log: str, at: int, how: str) -> None:
    """In the fork: train, then leave the number of events in a file beside the log."""
    events = Events(at, how)
    Trainer.train_step = events.update(Trainer.train_step)
    Trainer.valid_step = events.around(Trainer.valid_step)
    checkpoint_utils._torch_persistent_save = events.half_saved
    shutil.copyfile = events.half_copied
    os.rename, os.remove = events.around(os.rename), events.around(os.remove)
    sys.argv = ["fairseq-train", *arguments, "--save-dir", save_dir]
    train = importlib.import_module("fairseq_cli.train")
    with open(log, "a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        train.cli_main()
    Path(log + ".events").write_text(str(events.count))


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    ended = []
    for job in jobs["runs"]:
        child = os.fork()
        if not child:
            code = 1
            try:
                run(jobs["arguments"], **job)
                code = 0
            except SystemExit as error:
                code = error.code
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counted = Path(job["log"] + ".events")
        ended.append([code, int(counted.read_text()) if code == 0 else None])
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
