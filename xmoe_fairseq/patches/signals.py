"""End a training at SIGTERM or SIGUSR1 after the current update, with a checkpoint.

``checkpoint_last.pt`` and the file ``MARKER`` are written, and the process exits with ``SAVED``. docs/interruptions.md
tells how scripts use it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from torch.multiprocessing import ProcessExitedException

from .wrap import training_loops, wrap

logger = logging.getLogger(__name__)
# EX_TEMPFAIL of sysexits.h: try again later. The checkpoint is written and the same command continues.
SAVED = 75
# This file in --save-dir tells of the checkpoint where a launcher changes exit codes (torchrun makes all of them 1).
MARKER = "stopped-by-signal"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: int | None = None
_previous_handlers: dict[int, Any] = {}


def install() -> None:
    """Wrap the function that starts the ranks, and the loop's own functions when a trainer is built."""
    wrap(Trainer, "__init__", "stop-by-signal", _start)
    wrap(Trainer, "consolidate_optimizer", "stop-by-signal", _note_saving)
    wrap(distributed_utils, "call_main", "stop-by-signal", _call_main)


def _start(original: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    original(trainer, *args, **kwargs)
    trainer.updates_saved = None
    for module in training_loops():
        wrap(module, "train", "stop-by-signal", _train)
        wrap(module, "validate_and_save", "stop-by-signal", _validate_and_save)


def _train(original: Callable[..., Any], cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any) -> Any:
    if not _handles_signals(cfg):
        return original(cfg, trainer, task, epoch_itr)
    _listen()
    if trainer.is_data_parallel_master:
        Path(cfg.checkpoint.save_dir, MARKER).unlink(missing_ok=True)
    is_last = True
    try:
        losses, should_stop = original(cfg, trainer, task, epoch_itr)
        is_last = should_stop or epoch_itr.next_epoch_idx > (cfg.optimization.max_epoch or math.inf)
    finally:
        if is_last:
            _stop_listening()
    return losses, should_stop


def _validate_and_save(original: Callable[..., Any], cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any, *rest: Any):
    losses, should_stop = original(cfg, trainer, task, epoch_itr, *rest)
    if _handles_signals(cfg) and _signal_on_any_rank(trainer) and not should_stop:
        _save_and_exit(cfg, trainer, task, epoch_itr)
    return losses, should_stop


def _handles_signals(cfg: Any) -> bool:
    """True if this run saves checkpoints to continue from, and is not in a thread, where Python allows no handlers."""
    return not (cfg.checkpoint.no_save or cfg.checkpoint.no_last_checkpoints) and (
        threading.current_thread() is threading.main_thread()
    )


def _listen() -> None:
    global _received
    if not _previous_handlers:
        _received = None
        _previous_handlers.update({number: signal.signal(number, _note) for number in SIGNALS})


def _stop_listening() -> None:
    for number, handler in _previous_handlers.items():
        signal.signal(number, handler)
    _previous_handlers.clear()


def _note(number: int, _frame: Any) -> None:
    global _received
    _received = number
    # A SIGTERM for the whole process group also ends torch's loading workers, and their end would raise here in an
    # update.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _signal_on_any_rank(trainer: Trainer) -> bool:
    """True on every rank if any rank received a signal, because ranks receive it between different updates."""
    if trainer.data_parallel_world_size == 1:
        return _received is not None
    flag = torch.tensor([float(_received is not None)], device=trainer.device)
    return bool(distributed_utils.all_reduce(flag, group=trainer.data_parallel_process_group, op="max").item())


def _note_saving(original: Callable[..., None], trainer: Trainer) -> None:
    original(trainer)
    trainer.updates_saved = trainer.get_num_updates()


def _save_and_exit(cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any) -> None:
    updates, folder = trainer.get_num_updates(), Path(cfg.checkpoint.save_dir)
    if trainer.updates_saved != updates:
        extra_state = {"train_iterator": epoch_itr.state_dict(), "val_loss": None}
        if hasattr(checkpoint_utils.save_checkpoint, "best"):
            extra_state["best"] = checkpoint_utils.save_checkpoint.best
        if hasattr(task, "get_checkpoint_dict"):
            extra_state.update(task.get_checkpoint_dict())
        trainer.consolidate_optimizer()
        if trainer.should_save_checkpoint_on_current_rank:
            trainer.save_checkpoint(str(folder / f"checkpoint_last{trainer.checkpoint_suffix}.pt"), extra_state)
        elif trainer.always_call_state_dict_during_save_checkpoint:
            trainer.state_dict()
    if cfg.checkpoint.write_checkpoints_asynchronously:
        PathManager.async_close()
    if trainer.is_data_parallel_master:
        folder.joinpath(MARKER).write_text(f"update {updates}\n")
        logger.info(
            "stopped by a signal at update %d, saved; the same command continues (exit code %d)", updates, SAVED
        )
    if trainer.data_parallel_world_size > 1:
        torch.distributed.barrier()  # a rank that ends while rank 0 writes would end the others
    _stop_listening()
    raise SystemExit(SAVED)


def _call_main(original: Callable[..., Any], cfg: Any, main: Any, **kwargs: Any) -> Any:
    """Where fairseq-train itself starts the ranks, pass signals on to them and return their exit code."""
    spawns = cfg.distributed_training.distributed_world_size > 1 and not cfg.distributed_training.distributed_no_spawn
    if not spawns or threading.current_thread() is not threading.main_thread():
        return original(cfg, main, **kwargs)
    previous = {number: signal.signal(number, _pass_on) for number in SIGNALS}
    try:
        return original(cfg, main, **kwargs)
    except ProcessExitedException as error:
        if error.exit_code == SAVED:
            raise SystemExit(SAVED) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _pass_on(number: int, _frame: Any) -> None:
    for child in torch.multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, number)
