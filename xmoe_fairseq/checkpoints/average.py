"""Average the weights of several checkpoints of one training run.

Unlike fairseq's own scripts/average_checkpoints.py, this works under torch's weights_only protection.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..command_line import CommandParser, command_parser, reports_errors
from ..files import keep_inputs
from .files import CheckpointError, State, load_checkpoint, num_updates, save_checkpoint, without_optimizer


class Candidate(NamedTuple):
    """A checkpoint; ``score`` is its --best-checkpoint-metric, None if fairseq did not validate when it was written."""

    path: Path
    updates: int
    score: float | None
    higher_is_better: bool


def average_checkpoints(paths: Sequence[str | Path]) -> State:
    """The last checkpoint of ``paths`` with the mean of all weights, without optimiser state.

    Means are taken in float64 and rounded to each tensor's own dtype; tensors of integers must be equal. Tensors that
    share memory (tied embeddings) still share it.

    Raises:
        CheckpointError: no input, a damaged or unsafe file, or names, shapes, dtypes or integers that differ.
    """
    if not paths:
        raise CheckpointError("nothing to average: give at least one checkpoint")
    states = [load_checkpoint(path, mmap=True) for path in paths]
    models = [state["model"] for state in states]
    for path, model in zip(paths[1:], models[1:], strict=True):
        _require_same_layout(paths[0], models[0], path, model)
    state = without_optimizer(states[-1])
    state["model"] = _mean_model(models)
    extra = {**(state.get("extra_state") or {}), "averaged_from": [Path(path).name for path in paths]}
    extra.pop("val_loss", None)  # the score of the last checkpoint is not that of the average
    state["extra_state"] = extra
    return state


def _require_same_layout(first_path: Any, first: dict[str, Any], path: Any, model: dict[str, Any]) -> None:
    if missing := sorted(first.keys() ^ model.keys()):
        raise CheckpointError(
            f"{path} and {first_path} are of different models: only one of them has {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            + "; average checkpoints of one run"
        )
    for name, tensor in first.items():
        ours, theirs = _description(tensor), _description(model[name])
        if ours != theirs:
            raise CheckpointError(
                f"{name} is {theirs} in {path}, but {ours} in {first_path}; average checkpoints of one run"
            )


def _description(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _mean_model(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    means: dict[Any, Tensor] = {}
    averaged = {}
    for name in models[0]:
        tensors = [model[name] for model in models]
        place = tuple((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) for tensor in tensors)
        if place not in means:
            means[place] = _mean(name, tensors)
        averaged[name] = means[place]
    return averaged


def _mean(name: str, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if first.is_floating_point():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for tensor in tensors:
            total += tensor
        return (total / len(tensors)).to(first.dtype)
    if any(not torch.equal(first, tensor) for tensor in tensors[1:]):
        raise CheckpointError(f"{name} holds integers that differ between the checkpoints; they cannot be averaged")
    return first.clone()


def candidates(folder: str | Path) -> list[Candidate]:
    """Every checkpoint*.pt of a folder, oldest first; copies of one update (``checkpoint_best.pt``) count once."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder}")
    by_update: dict[int, Candidate] = {}
    for path in sorted(folder.glob("checkpoint*.pt")):
        state = load_checkpoint(path, verify=False, mmap=True)
        extra = state.get("extra_state") or {}
        if "averaged_from" in extra:
            continue
        cfg = (state.get("cfg") or {}).get("checkpoint") or {}
        candidate = Candidate(
            path,
            num_updates(state),
            extra.get("val_loss"),
            bool(cfg.get("maximize_best_checkpoint_metric", False)),
        )
        known = by_update.get(candidate.updates)
        if known is None or known.score is None:
            by_update[candidate.updates] = candidate
    return sorted(by_update.values(), key=lambda candidate: candidate.updates)


def choose_last(folder: str | Path, num: int, *, allow_fewer: bool = False) -> list[Candidate]:
    """The ``num`` checkpoints with the most updates; with ``allow_fewer`` all of a smaller number, at least one."""
    return _enough(candidates(folder), num, folder, allow_fewer)[-num:]


def choose_best(folder: str | Path, num: int, *, allow_fewer: bool = False) -> list[Candidate]:
    """The ``num`` checkpoints with the best validation score, best last; ``allow_fewer`` as in `choose_last`.

    The score is ``extra_state["val_loss"]``, which fairseq stores with every checkpoint: the value of its
    --best-checkpoint-metric (loss by default; --maximize-best-checkpoint-metric turns the order round).
    """
    scored = [candidate for candidate in candidates(folder) if candidate.score is not None]
    scored = _enough(scored, num, folder, allow_fewer, "validated ")
    sign = 1 if scored[0].higher_is_better else -1
    return sorted(scored, key=lambda candidate: sign * candidate.score)[-num:]  # type: ignore[operator]


def _enough(found: Sequence[Candidate], num: int, folder: Any, allow_fewer: bool, kind: str = "") -> list[Candidate]:
    if num < 1:
        raise CheckpointError(f"--num ({num}) must be at least 1")
    if len(found) < (1 if allow_fewer else num):
        raise CheckpointError(
            f"{folder} holds {len(found)} different {kind}checkpoints, --num asks for {num}; lower --num, or train "
            "with --keep-last-epochs or --keep-best-checkpoints of at least that many"
        )
    return list(found)


def _parser() -> CommandParser:
    parser = command_parser(
        "checkpoint average",
        "Average the weights of checkpoints of one training run into one file for fairseq-generate. The "
        "optimiser state is left out.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoints", nargs="+", metavar="FILE", help="files to average; settings come from the last"
    )
    parser.old_name("--inputs", "--checkpoints")
    source.add_argument("--best-of", metavar="DIR", help="the --num best of a folder by the stored validation score")
    source.add_argument("--last-of", metavar="DIR", help="the --num last of a folder by number of updates")
    parser.add_argument("--num", type=int, metavar="N", help="how many, for --best-of and --last-of")
    fewer = "average what there is if that is less than --num, and say so"
    parser.add_argument("--allow-fewer", action="store_true", help=fewer)
    parser.flag("--out", old="--output", required=True)
    return parser


def _chosen(args: argparse.Namespace) -> Iterable[Candidate]:
    if args.num is None:
        raise CheckpointError("--best-of and --last-of need --num N, the number of checkpoints to average")
    choose, folder = (choose_best, args.best_of) if args.best_of else (choose_last, args.last_of)
    return choose(folder, args.num, allow_fewer=args.allow_fewer)


@reports_errors("average")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    paths = args.checkpoints
    if paths is None:
        chosen = list(_chosen(args))
        for candidate in chosen:
            print(f"{candidate.path}  update {candidate.updates}  score {candidate.score}")
        if len(chosen) < args.num:
            print(
                f"average: warning: {len(chosen)} checkpoints instead of {args.num}: there are no more", file=sys.stderr
            )
        paths = [candidate.path for candidate in chosen]
    elif args.num is not None:
        raise CheckpointError("--num goes with --best-of or --last-of; --checkpoints takes all it is given")
    keep_inputs(args.out, *paths)
    save_checkpoint(average_checkpoints(paths), args.out)
    print(f"{args.out}: the mean of {len(paths)} checkpoints")


if __name__ == "__main__":
    sys.exit(main())
