"""Mend ``--amp``: unscale gradients once, save the loss scale, and support every device and several ranks.

fairseq's AMPOptimizer unscales the gradients of the torch optimiser and then gives its own wrapper to
``GradScaler.step``. GradScaler identifies optimisers by object, so it divides by the loss scale a second time. Adam
then gets gradients that are too small by the scale, which makes its eps too large by as much. Moreover fairseq does not
save the scale, ignores ``--amp-init-scale`` in favour of ``--fp16-init-scale``, and computes ``--amp`` on a CPU in
float32.

``--amp --bf16`` together select autocast to bfloat16: parameters, gradients and checkpoints stay float32, as with
``--amp`` alone, and no loss scale is needed. ``--bf16`` alone stays fairseq's: the whole model in bfloat16, with a
float32 copy in the optimiser that is not saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks.fairseq_task import FairseqTask
from fairseq.trainer import Trainer

from .wrap import wrap

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap the optimiser, and the functions that give it the device and the number format."""
    wrap(Trainer, "__init__", "amp-bfloat16", _start)
    wrap(Trainer, "_build_optimizer", "amp-bfloat16", _build_optimizer)
    wrap(FairseqTask, "train_step", "amp-bfloat16", _train_step)
    wrap(AMPOptimizer, "__init__", "amp-one-unscaling", _build_scaler)
    wrap(AMPOptimizer, "step", "amp-one-unscaling", _step)
    wrap(AMPOptimizer, "clip_grad_norm", "amp-overflow-on-any-rank", _clip_grad_norm)
    wrap(AMPOptimizer, "state_dict", "amp-kept-scale", _state_dict)
    wrap(AMPOptimizer, "load_state_dict", "amp-kept-scale", _load_state_dict)


def _start(original: Callable[..., None], trainer: Trainer, cfg: Any, *args: Any, **kwargs: Any) -> None:
    both = cfg.common.amp and cfg.common.bf16
    trainer.amp_dtype = torch.bfloat16 if both else torch.float16
    if both:
        logger.info("--amp --bf16: autocast to bfloat16, float32 parameters, no loss scale")
        # fairseq would make the whole model bfloat16 and, without a GPU, look for a TPU
        cfg.common.bf16, cfg.common.tpu = False, False
    original(trainer, cfg, *args, **kwargs)
    if both:
        cfg.common.bf16 = True  # the class name in the checkpoint


def _build_optimizer(original: Callable[..., None], trainer: Trainer) -> None:
    original(trainer)
    _accept_other_precision(trainer)
    if isinstance(trainer.optimizer, AMPOptimizer):
        trainer.optimizer.amp_dtype = trainer.amp_dtype
        if trainer.amp_dtype is torch.bfloat16:  # bfloat16 has float32's exponents, so no loss scale is needed
            trainer.optimizer._grad_scaler = torch.amp.GradScaler(trainer.device.type, enabled=False)


def _accept_other_precision(trainer: Trainer) -> None:
    """Let a checkpoint of --amp continue in float32 and the reverse, since the optimiser inside is the same.

    fairseq compares class names while it loads, after it has built the optimiser.
    """
    history = trainer._optim_history
    here = type(trainer.optimizer).__name__
    inner = type(getattr(trainer.optimizer, "fp32_optimizer", None)).__name__
    saved = history[-1].get("optimizer_name") if history else None
    from_float32 = here == AMPOptimizer.__name__ and saved == inner
    to_float32 = saved == AMPOptimizer.__name__ and not (trainer.cfg.common.fp16 or trainer.cfg.common.bf16)
    if from_float32 or to_float32:
        history[-1]["optimizer_name"] = here


def _build_scaler(
    original: Callable[..., None], optimizer: AMPOptimizer, cfg: Any, params: Any, *rest: Any, **kwargs: Any
):
    params = list(params)
    original(optimizer, cfg, params, *rest, **kwargs)
    window = {} if cfg.common.amp_scale_window is None else {"growth_interval": cfg.common.amp_scale_window}
    device = params[0].device.type if params else "cuda"
    optimizer._grad_scaler = torch.amp.GradScaler(device, init_scale=float(cfg.common.amp_init_scale), **window)


def _train_step(
    original: Callable[..., Any],
    task: Any,
    sample: Any,
    model: Any,
    criterion: Any,
    optimizer: Any,
    *rest: Any,
    **kwargs: Any,
):
    if not isinstance(optimizer, AMPOptimizer):
        return original(task, sample, model, criterion, optimizer, *rest, **kwargs)
    criterion_under_autocast = _Autocast(
        criterion, optimizer.scaler._device, getattr(optimizer, "amp_dtype", torch.float16)
    )
    return original(task, sample, model, criterion_under_autocast, optimizer, *rest, **kwargs)


class _Autocast:
    """Runs a criterion's forward pass under autocast of one device and dtype; fairseq's own is float16 on CUDA."""

    def __init__(self, criterion: Any, device: str, dtype: torch.dtype) -> None:
        self._criterion, self._device, self._dtype = criterion, device, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device, dtype=self._dtype):
            return self._criterion(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._criterion, name)


def _step(_original: Callable[..., None], optimizer: AMPOptimizer) -> None:
    optimizer.scaler.step(optimizer.optimizer)  # the optimiser that clip_grad_norm has unscaled
    optimizer.scaler.update()


def _clip_grad_norm(original: Callable[..., Any], optimizer: AMPOptimizer, *args: Any, **kwargs: Any) -> Any:
    if not optimizer.scaler.is_enabled():
        norm = optimizer.fp32_optimizer.clip_grad_norm(*args, **kwargs)
        if not torch.isfinite(norm).all():  # without a scale to lower, fairseq treats it as an error, as in float32
            raise FloatingPointError("gradients are Nan/Inf")
        return norm
    norm = original(optimizer, *args, **kwargs)
    group_size = distributed_utils.get_data_parallel_world_size()
    if group_size > 1:
        # experts differ by rank, so an overflow on one rank must skip the update and lower the scale on all ranks
        for found in optimizer.scaler._found_inf_per_device(optimizer.optimizer).values():
            distributed_utils.all_reduce(found, group=distributed_utils.get_data_parallel_group(), op="max")
    return norm


def _state_dict(original: Callable[..., dict[str, Any]], optimizer: AMPOptimizer) -> dict[str, Any]:
    return {**original(optimizer), "loss_scaler": optimizer.scaler.state_dict()}


def _load_state_dict(
    original: Callable[..., None], optimizer: AMPOptimizer, state: dict[str, Any], overrides: Any = None
) -> None:
    saved = state.get("loss_scaler")
    original(optimizer, {name: value for name, value in state.items() if name != "loss_scaler"}, overrides)
    if saved and optimizer.scaler.is_enabled():
        window = optimizer.scaler.get_growth_interval()  # the flags' value, as for Adam's settings
        optimizer.scaler.load_state_dict(saved)
        optimizer.scaler.set_growth_interval(window)
