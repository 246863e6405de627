"""Let fairseq's trainer work with experts that ``--moe-expert-parallel`` spreads over ranks.

Stock fairseq already leaves parameters marked ``expert`` out of its gradient all-reduce. Three things are added around
its functions when the first expert-parallel model of a process is built:

- The gradient norm is that of replicated experts, equal on every rank. Stock fairseq leaves experts out of it.
- Saving gathers all experts and their optimiser state in ``Trainer.consolidate_optimizer``, which every rank calls.
  Rank 0 writes one file, as without expert parallelism.
- Loading reads the file on rank 0, which sends each rank its slice of the experts and of their optimiser state.
"""

from __future__ import annotations

import functools
import logging
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor, nn

from ..moe.experts.ranks import WEIGHTS, ParallelExperts, gather_experts, local_slice, norm_over_ranks, num_ranks
from .wrap import wrap

logger = logging.getLogger(__name__)
# The trainer that is loading a checkpoint. fairseq's broadcast does not receive it as an argument.
_loading: Trainer | None = None


def install() -> None:
    """Wrap fairseq's functions; runs without parallel experts are not affected."""
    wrap(utils, "clip_grad_norm_", "expert-gradient-norm", _clip_grad_norm)
    wrap(Trainer, "__init__", "expert-parallel-checks", _start)
    wrap(Trainer, "_build_optimizer", "expert-moments-of-this-rank", _build_optimizer)
    wrap(Trainer, "consolidate_optimizer", "gathered-experts", _consolidate)
    wrap(Trainer, "state_dict", "gathered-experts", _state_dict)
    wrap(Trainer, "load_checkpoint", "expert-part-of-this-rank", _load_checkpoint)
    wrap(distributed_utils, "broadcast_object", "expert-part-of-this-rank", _broadcast)


def parallel_experts(model: nn.Module) -> dict[str, ParallelExperts]:
    """Module name -> experts, in the model's order, which is the same on every rank."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}


def _clip_grad_norm(
    original: Callable[..., Any], params: Any, max_norm: float, aggregate_norm_fn: Any = None
) -> Tensor:
    params = [params] if isinstance(params, Tensor) else list(params)
    experts = [param for param in params if hasattr(param, "expert")]
    if not experts or aggregate_norm_fn is not None:
        return original(params, max_norm, aggregate_norm_fn)
    grads = [param.grad.detach() for param in experts if param.grad is not None]
    return original(params, max_norm, lambda shared_norm: norm_over_ranks(shared_norm, grads))


def _start(original: Callable[..., Any], trainer: Trainer, cfg: Any, task: Any, model: nn.Module, *rest: Any) -> None:
    experts = parallel_experts(model)
    if experts:
        check_supported(cfg, task)
        # torch's DDP reads this list of names, and neither broadcasts nor reduces the experts, which differ by rank
        model._ddp_params_and_buffers_to_ignore = [f"{name}.{weight}" for name in experts for weight in WEIGHTS]
    original(trainer, cfg, task, model, *rest)


def check_supported(cfg: Any, task: Any) -> None:
    """Raise ValueError for fairseq options that expert parallelism cannot honour.

    Args:
        cfg: fairseq's whole configuration.
    """
    backend = cfg.distributed_training.ddp_backend
    allowed = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d")
    refused = {
        f"--ddp-backend {backend}; choose one of {', '.join(allowed)}": backend not in allowed,
        "--zero-sharding os, which would deal out the experts again; set it to none": (
            cfg.distributed_training.zero_sharding != "none"
        ),
        "--use-bmuf; leave it out": cfg.optimization.use_bmuf,
        "--fp16 with flat gradients, which hide the experts; add --fp16-no-flatten-grads, or use --amp or --bf16": (
            cfg.common.fp16 and not cfg.common.fp16_no_flatten_grads and not cfg.common.memory_efficient_fp16
        ),
        "--ema-fp32; leave it out (--store-ema works)": cfg.ema.store_ema and cfg.ema.ema_fp32,
        "--eval-bleu: ranks decode different numbers of steps and would wait for each other for ever; validate on the "
        "loss and translate with a saved checkpoint, which holds all experts": getattr(task.cfg, "eval_bleu", False),
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"--moe-expert-parallel does not work with {reason}")


class _Whole(NamedTuple):
    """All experts on rank 0 between gathering and saving: by names of the state dict, optimiser slots by position."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]


def _consolidate(original: Callable[..., Any], trainer: Trainer) -> None:
    if parallel_experts(trainer.get_model()):
        _never_gather_alone(sys.exc_info()[1])
    original(trainer)
    if not parallel_experts(trainer.get_model()):
        return
    trainer._whole_experts = None  # frees the tensors of a gathering that was not saved
    ema = _gather_weights(trainer.ema.get_model()) if trainer.cfg.ema.store_ema else {}
    optimizer = {} if trainer.cfg.checkpoint.no_save_optimizer_state else _gather_slots(trainer.optimizer.optimizer)
    whole = _Whole(_gather_weights(trainer.get_model()), ema, optimizer)
    if trainer.is_data_parallel_master:
        trainer._whole_experts = whole


def _never_gather_alone(error: BaseException | None) -> None:
    """Do not write crash.pt when one rank raises in a forward pass, since the other ranks do not join the gathering.

    They wait in an exchange that this rank left. This rank ends with its own error, and its closed connections end the
    others. An infinite gradient norm is the same on every rank, and its crash.pt is written.
    """
    frame = error.__traceback__ if error is not None else None
    while frame is not None:
        if "tasks" in Path(frame.tb_frame.f_code.co_filename).parts:
            logger.error("this rank stops, without crash.pt: the experts of the other ranks are out of reach")
            raise error
        frame = frame.tb_next


def _gather_weights(model: nn.Module) -> dict[str, Tensor]:
    named = ((f"{name}.{w}", getattr(experts, w)) for name, experts in parallel_experts(model).items() for w in WEIGHTS)
    return {name: gather_experts(weight) for name, weight in named}


def _expert_positions(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """Position of each expert parameter in the optimiser's state dict -> the parameter."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {position: param for position, param in enumerate(params) if hasattr(param, "expert")}


def _gather_slots(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Optimiser state that has the shape of its parameter (Adam's moments), for all experts."""
    slots: dict[int, dict[str, Tensor]] = {}
    for position, param in _expert_positions(optimizer).items():
        state = optimizer.state.get(param, {})
        names = sorted(name for name, value in state.items() if torch.is_tensor(value) and value.shape == param.shape)
        slots[position] = {name: gather_experts(state[name]) for name in names}
    return slots


def _state_dict(original: Callable[..., Any], trainer: Trainer) -> dict[str, Any]:
    state = original(trainer)
    if not parallel_experts(trainer.get_model()):
        return state
    whole = getattr(trainer, "_whole_experts", None)
    if whole is None:
        raise RuntimeError("experts lie on several ranks: call trainer.consolidate_optimizer() on every rank first")
    trainer._whole_experts = None
    state["model"].update(whole.model)
    if whole.ema:
        state["extra_state"]["ema"].update(whole.ema)
    for position, slots in whole.optimizer.items():
        if slots:
            saved = state["last_optimizer_state"]["state"]
            saved[position] = {**saved[position], **slots}
    return state


def _load_checkpoint(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    global _loading
    _loading = trainer if parallel_experts(trainer.get_model()) else None
    try:
        return original(trainer, *args, **kwargs)
    finally:
        _loading = None


def _broadcast(original: Callable[..., Any], obj: Any, src_rank: int, group: Any, dist_device: Any = None) -> Any:
    """While a checkpoint is loaded, send every rank all but the experts, and then its own experts."""
    if _loading is None:
        return original(obj, src_rank, group, dist_device)
    trainer, is_source = _loading, distributed_utils.get_rank(group) == src_rank
    whole = _take_experts(trainer, obj) if is_source else {}
    if is_source:
        obj["expert_tensors"] = [(path, list(value.shape), str(value.dtype)) for path, value in whole.items()]
    received = original(obj, src_rank, group, dist_device)
    state = obj if is_source else received  # fairseq continues with the object that it read
    for path, shape, dtype in state.pop("expert_tensors"):
        device = dist_device or trainer.device
        part = torch.empty(shape[0] // num_ranks(), *shape[1:], dtype=getattr(torch, dtype[6:]), device=device)
        chunks = whole.pop(tuple(path)).chunk(num_ranks()) if is_source else ()
        parts = [chunk.contiguous().to(device) for chunk in chunks] or None
        dist.scatter(part, parts, src=src_rank, group=group)
        functools.reduce(operator.getitem, path[:-1], state)[path[-1]] = part.cpu()
    return state


def _take_experts(trainer: Trainer, state: dict[str, Any]) -> dict[tuple[Any, ...], Tensor]:
    """Take the tensors of all experts out of a checkpoint: path of keys -> tensor with E as its first axis."""
    experts = parallel_experts(trainer.get_model())
    names = [f"{name}.{weight}" for name in experts for weight in WEIGHTS]
    paths = [(*group, name) for group in (("model",), ("extra_state", "ema")) for name in names]
    slots = (state.get("last_optimizer_state") or {}).get("state", {})
    for position, param in _expert_positions(trainer.optimizer.optimizer).items():
        for slot, value in slots.get(position, {}).items():
            if torch.is_tensor(value) and value.dim() and value.shape[1:] == param.shape[1:]:
                paths.append(("last_optimizer_state", "state", position, slot))
    taken = {}
    for *path, last in paths:
        holder = functools.reduce(lambda inner, key: inner.get(key) or {}, path, state)
        if last in holder:
            taken[(*path, last)] = holder.pop(last)
    return taken


def _build_optimizer(original: Callable[..., Any], trainer: Trainer) -> None:
    original(trainer)
    experts = parallel_experts(trainer.get_model())
    if experts:
        held = local_slice(next(iter(experts.values())).num_experts)
        trainer.optimizer.optimizer.register_load_state_dict_pre_hook(functools.partial(_slice_slots, held))


def _slice_slots(held: slice, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Reduce the state of all experts to this rank's in place, since half-precision optimisers read it again."""
    for position, param in _expert_positions(optimizer).items():
        slots = state_dict["state"].get(position, {})
        for name, value in slots.items():
            if torch.is_tensor(value) and value.dim() and value.shape[1:] == param.shape[1:]:
                slots[name] = value[held].clone() if value.size(0) != param.size(0) else value
