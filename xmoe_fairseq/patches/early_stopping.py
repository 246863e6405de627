"""Make an interrupted and continued training end as an uninterrupted one does, with early stopping too.

fairseq keeps the state of early stopping in attributes of a function, so that a resumed run starts to count anew. It
also counts validations at epoch ends like those of the chosen interval, and trains one more update when a finished run
is started again. Here the checkpoint holds that state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from .wrap import training_loops, wrap

logger = logging.getLogger(__name__)
# The state of the trainer that validates now, since fairseq's should_stop_early does not receive the trainer.
_current: Patience | None = None


@dataclass
class Patience:
    """The state of early stopping.

    Attributes:
        metric: the name of ``best``, fairseq's --best-checkpoint-metric.
        best: the best value so far; None before the first validation.
        num_runs: counted validations since then.
        counts: True if the next validation counts; not saved.
    """

    metric: str
    best: float | None = None
    num_runs: int = 0
    counts: bool = True

    def add(self, value: float, *, maximize: bool) -> None:
        """Add a validation: a better value is always kept, a worse one counts only at the interval."""
        if self.best is None or (value > self.best if maximize else value < self.best):
            self.best, self.num_runs = float(value), 0
        elif self.counts:
            self.num_runs += 1

    def is_used_up(self, patience: int) -> bool:
        """True if training ends with --patience ``patience``; 0 and less never ends it."""
        return 0 < patience <= self.num_runs


def install() -> None:
    """Wrap the functions that the training loop calls, and the loop's own functions when a trainer is built."""
    wrap(Trainer, "__init__", "kept-patience", _start)
    wrap(Trainer, "save_checkpoint", "kept-patience", _save_patience)
    wrap(Trainer, "load_checkpoint", "kept-patience", _load_patience)


def _start(original: Callable[..., None], trainer: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
    original(trainer, cfg, *args, **kwargs)
    trainer.patience = Patience(trainer.cfg.checkpoint.best_checkpoint_metric)
    trainer.is_resumed = False
    vars(checkpoint_utils.save_checkpoint).pop("best", None)  # state of an earlier training in this process
    for module in training_loops():
        wrap(module, "should_stop_early", "kept-patience", _should_stop_early)
        wrap(module, "validate_and_save", "kept-patience", _validate_and_save)
        wrap(module, "train", "finished-run", _train)


def _should_stop_early(original: Callable[..., bool], cfg: Any, valid_loss: float | None) -> bool:
    patience = _current
    if patience is None:  # another loop than fairseq's called it
        return original(cfg, valid_loss)
    if valid_loss is None or cfg.checkpoint.patience <= 0:
        return False
    patience.add(valid_loss, maximize=cfg.checkpoint.maximize_best_checkpoint_metric)
    if patience.is_used_up(cfg.checkpoint.patience):
        logger.info("early stop: no better %s in the last %d validations", patience.metric, patience.num_runs)
        return True
    return False


def _validate_and_save(
    original: Callable[..., Any],
    cfg: Any,
    trainer: Trainer,
    task: Any,
    epoch_itr: Any,
    subsets: Any,
    end_of_epoch: bool,
) -> Any:
    global _current
    intervals = (cfg.checkpoint.save_interval_updates, cfg.dataset.validate_interval_updates)
    intervals = [interval for interval in intervals if interval > 0]
    updates = trainer.get_num_updates()
    # without an interval in updates, validations are at epoch ends, and patience counts those
    trainer.patience.counts = not intervals or any(updates % interval == 0 for interval in intervals)
    _current = trainer.patience
    try:
        return original(cfg, trainer, task, epoch_itr, subsets, end_of_epoch)
    finally:
        _current = None


def _save_patience(original: Callable[..., Any], trainer: Trainer, filename: str, extra_state: dict[str, Any]) -> Any:
    state = asdict(trainer.patience)
    del state["counts"]
    return original(trainer, filename, {**extra_state, "early_stopping": state})


def _load_patience(
    original: Callable[..., Any],
    trainer: Trainer,
    filename: str,
    reset_optimizer: bool = False,
    reset_lr_scheduler: bool = False,
    optimizer_overrides: Any = None,
    reset_meters: bool = False,
) -> Any:
    is_own = Path(filename).parent == Path(trainer.cfg.checkpoint.save_dir)
    if is_own and trainer.is_data_parallel_master:
        _remove_half_written(Path(filename).parent)
    extra = original(trainer, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters)
    if extra is None or reset_optimizer or reset_meters:
        return extra
    if is_own and trainer.is_data_parallel_master:
        _remove_surplus(trainer.cfg.checkpoint, trainer.checkpoint_suffix)
    trainer.is_resumed = True
    metric = trainer.cfg.checkpoint.best_checkpoint_metric
    saved = extra.get("early_stopping") or {"metric": metric, "best": extra.get("best"), "num_runs": 0}
    if saved["metric"] == metric:
        trainer.patience = Patience(**saved)
    else:
        logger.warning(
            "%s was selected by %s, now by %s: the best so far is forgotten", filename, saved["metric"], metric
        )
        extra.pop("best", None)
    return extra


def _train(original: Callable[..., Any], cfg: Any, trainer: Trainer, task: Any, epoch_itr: Any) -> Any:
    if trainer.is_resumed and _is_finished(cfg, trainer):
        return [None], True
    trainer.is_resumed = False
    return original(cfg, trainer, task, epoch_itr)


def _is_finished(cfg: Any, trainer: Trainer) -> bool:
    """True if the run that wrote the checkpoint was finished; fairseq would train one more update to find out."""
    updates, max_update = trainer.get_num_updates(), cfg.optimization.max_update or math.inf
    if updates >= max_update:
        logger.info("the checkpoint has %d updates, max_update is %d: nothing left to train", updates, max_update)
        return True
    if trainer.patience.is_used_up(cfg.checkpoint.patience):
        logger.info("the checkpoint was the last one before an early stop: nothing left to train")
        return True
    return False


def _remove_half_written(folder: Path) -> None:
    """Remove files that a killed process of this run was writing, by the names of fairseq and of ``write_aside``."""
    for partial in (*folder.glob(".checkpoint*.partial-*"), *folder.glob("checkpoint*.pt.tmp")):
        partial.unlink(missing_ok=True)


def _remove_surplus(cfg: Any, suffix: str) -> None:
    """Remove the files that fairseq removes after its last save, if the process was killed between the two."""
    kept = {
        rf"checkpoint_\d+_(\d+){suffix}\.pt": cfg.keep_interval_updates
        if cfg.keep_interval_updates_pattern == -1
        else 0,
        rf"checkpoint(\d+){suffix}\.pt": cfg.keep_last_epochs,
        rf"checkpoint\.best_{cfg.best_checkpoint_metric}_(\d+\.?\d*){suffix}\.pt": cfg.keep_best_checkpoints,
    }
    for pattern, number in kept.items():
        paths = checkpoint_utils.checkpoint_paths(cfg.save_dir, pattern=pattern)  # in descending order
        if "best" in pattern and not cfg.maximize_best_checkpoint_metric:
            paths = paths[::-1]
        for path in paths[number:] if number > 0 else []:
            Path(path).unlink()
