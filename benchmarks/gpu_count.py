"""Count launches, host waits, bytes, FLOPs and paper time of one layer on a GPU, without a GPU.

    xmoe bench gpu-count [--out FILE]

The torch way runs on CPU tensors with ``host.on_cpu`` answering no, so that it takes the steps it takes on CUDA. A
dispatch mode counts each call that is not a view or an allocation. Half-precision products are not computed, because
their values change no count. The Triton way runs dry: its launches and their costs are recorded and nothing is
executed. Calls of torch beside them are counted in the same way. Kept rows are those that the torch way kept.

Bytes count each operand of a call once and each result once. Tile bytes are what the programs of a kernel load and
store at its tile sizes, re-reads by several programs included; for calls of torch they are the bytes. Paper time of a
launch: max(bytes / 2.5 TB/s, FLOPs / 500 TFLOP/s, 3 us), of a sort at least 60 us. Tokens: 8,192 in training, a tenth
of them padding; 320 and 5 in decoding, where a token wants about 4 experts.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.common import kept_bytes, table, write_result
from benchmarks.layer import CASES, DENSE, WIDTH, Case, scale_for
from benchmarks.peers import DenseFFN
from xmoe_fairseq.command_line import command_parser, reports_errors
from xmoe_fairseq.moe import MoEConfig, MoELayer, flops, host, kernels

BYTES_PER_SECOND, FLOPS_PER_SECOND, LAUNCH_SECONDS, SORT_SECONDS = 2.5e12, 500e12, 3e-6, 60e-6
TOKENS, DECODED = 8192, (320, 5)
DTYPE = torch.bfloat16
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_consecutive", "_unique2", "_unique"}
# Products and the shapes of their results; a grouped one of two matrices makes one matrix a group.
PRODUCTS: dict[str, Callable[..., tuple[int, ...]]] = {
    "mm": lambda a, b: (a.size(0), b.size(1)),
    "addmm": lambda bias, a, b: (a.size(0), b.size(1)),
    "bmm": lambda a, b: (a.size(0), a.size(1), b.size(2)),
    "baddbmm": lambda bias, a, b: (a.size(0), a.size(1), b.size(2)),
    "_grouped_mm": lambda a, b, offs: (a.size(0), b.size(-1)) if b.dim() == 3 else (offs.numel(), a.size(0), b.size(1)),
}


@dataclass
class Count:
    """Sums over the launches of one run. ``calls`` maps a name to its launches, bytes and paper microseconds."""

    launches: int = 0
    waits: int = 0
    bytes: float = 0.0
    tile_bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    calls: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, bytes_: float, flops_: float, tile_bytes: float | None = None) -> None:
        """Add one launch."""
        least = SORT_SECONDS if name in ("sort", "argsort") else LAUNCH_SECONDS
        seconds = max(bytes_ / BYTES_PER_SECOND, flops_ / FLOPS_PER_SECOND, least)
        self.launches += 1
        self.bytes += bytes_
        self.tile_bytes += bytes_ if tile_bytes is None else tile_bytes
        self.flops += flops_
        self.seconds += seconds
        call = self.calls.setdefault(name, [0, 0.0, 0.0])
        for place, amount in enumerate((1, bytes_, 1e6 * seconds)):
            call[place] += amount

    def row(self) -> dict[str, Any]:
        return {
            "launches": self.launches,
            "waits": self.waits,
            "MB": self.bytes / 1e6,
            "tile_MB": self.tile_bytes / 1e6,
            "GFLOP": self.flops / 1e9,
            "paper_ms": 1e3 * self.seconds,
        }


class CountedCalls(TorchDispatchMode):
    """Counts calls of torch that would launch a kernel on a GPU, and those at which the host would wait for it."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.count.waits += name in WAITS
        result = self._product(name, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if func.is_view or name in ALLOCATES or name == "_local_scalar_dense":
            return result
        operands = _tensors((args, kwargs))
        moved = sum(_held_bytes(tensor) for tensor in operands + _tensors(result))
        self.count.add(name, moved, _flops(func, args, kwargs, result))
        return result

    @staticmethod
    def _product(name: str, args: Any, kwargs: Any) -> Any:
        """A result of zeros in place of a half-precision product, whose values are not used."""
        tensors = _tensors((args, kwargs))
        if name not in PRODUCTS or tensors[0].dtype == torch.float32:
            return None
        out = kwargs.get("out")
        return tensors[0].new_zeros(PRODUCTS[name](*tensors)) if out is None else out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _held_bytes(tensor: Tensor) -> int:
    """Bytes that a kernel touches; a broadcast dimension is read once."""
    size = 1
    for length, step in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if step else min(length, 1)
    return size * tensor.element_size()


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    if func.overloadpacket.__name__ == "_grouped_mm":
        return float(flops._grouped_gemm_flops(args[0].shape, args[1].shape))
    formula = flop_registry.get(func.overloadpacket)
    return float(formula(*args, **kwargs, out_val=result)) if formula else 0.0


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Make the torch way take on CPU tensors the steps that it takes on CUDA."""
    on_cpu = host.on_cpu
    host.on_cpu = lambda tensor: False  # type: ignore[assignment]
    try:
        yield
    finally:
        host.on_cpu = on_cpu


def count_torch(run: Callable[[], object]) -> Count:
    count = Count()
    with as_on_a_gpu(), CountedCalls(count):
        run()
    return count


def count_triton(run: Callable[[], object], rows: int) -> Count:
    """``rows``: kept (token, expert) pairs to reckon with."""
    from xmoe_fairseq.moe.kernels.launch import record

    count = Count()
    with record(dry=True, rows=rows) as recorded, CountedCalls(count):
        run()
    for launch in recorded.launches:
        count.add(launch.kernel, launch.cost.bytes, launch.cost.flops, launch.cost.tile_bytes)
    return count


def step(module: nn.Module, x_TD: Tensor, padding: Tensor | None, *, backward: bool) -> Callable[[], Any]:
    """A call that runs a training step (gradients of the input and of all parameters), or its forward pass alone."""
    leaf, grad_TD = x_TD.detach().requires_grad_(), torch.randn_like(x_TD)
    leaves = [leaf, *module.parameters()]
    one = torch.ones(())

    def run() -> Any:
        if isinstance(module, MoELayer):
            y_TD, plan = module(leaf, padding)
            outputs, grads = [y_TD, plan.balance_loss], [grad_TD, one]
        else:
            plan, outputs, grads = None, [module(leaf)], [grad_TD]
        if backward:
            torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        return plan

    return run


def both_ways(config: MoEConfig) -> tuple[MoELayer, MoELayer]:
    """Our layer by torch's grouped products, which an H100 takes, and by kernels, with equal weights."""
    torch.manual_seed(0)
    by_torch = MoELayer(replace(config, compute="grouped")).to(DTYPE)
    by_triton = MoELayer(replace(config, compute="triton")).to(DTYPE)
    by_triton.load_state_dict(by_torch.state_dict())
    return by_torch, by_triton


def count_training(case: Case) -> list[dict[str, Any]]:
    """Rows of the table for one setting, forward and forward with backward."""
    x_TD, padding = torch.randn(TOKENS, WIDTH).to(DTYPE), torch.arange(TOKENS) % 10 == 0
    by_torch, by_triton = both_ways(replace(case.config(), eval_capacity_factor=None))
    dense = DenseFFN(WIDTH, DENSE).to(DTYPE)
    with as_on_a_gpu(), CountedCalls(Count()):
        rows = int(step(by_torch, x_TD, padding, backward=False)().count_E.sum())
    found = []
    for backward in (False, True):
        counts = {
            "dense": count_torch(step(dense, x_TD, None, backward=backward)),
            "torch": count_torch(step(by_torch, x_TD, padding, backward=backward)),
            "triton": count_triton(step(by_triton, x_TD, padding, backward=backward), rows),
        }
        mode = "forward and backward" if backward else "forward"
        found += labelled(counts, case=case.name, mode=mode, tokens=TOKENS, kept_rows=rows)
    return found


def count_decoding(tokens: int) -> list[dict[str, Any]]:
    """Count a few tokens through 64x1024, about 4 experts each, without capacity and gradients."""
    x_TD = torch.randn(tokens, WIDTH).to(DTYPE)
    layers = [layer.eval() for layer in both_ways(MoEConfig(WIDTH, 64, 1024, threshold=0.9))]
    dense = DenseFFN(WIDTH, DENSE).to(DTYPE).eval()
    with torch.no_grad():
        scale = scale_for(4.0, layers[0].router.weight, x_TD)
        for layer in layers:
            layer.router.weight.mul_(scale)
        with as_on_a_gpu(), CountedCalls(Count()):
            rows = int(layers[0](x_TD)[1].count_E.sum())
        counts = {
            "dense": count_torch(lambda: dense(x_TD)),
            "torch": count_torch(lambda: layers[0](x_TD)),
            "triton": count_triton(lambda: layers[1](x_TD), rows),
        }
    return labelled(counts, case="64x1024", mode="decode", tokens=tokens, kept_rows=rows)


def labelled(counts: dict[str, Count], **labels: Any) -> list[dict[str, Any]]:
    base = counts["dense"].seconds
    return [
        {**labels, "way": way, **count.row(), "of_dense": count.seconds / base, "calls": count.calls}
        for way, count in counts.items()
    ]


def count_kept(case: Case) -> dict[str, float]:
    """MB kept between forward and backward under autocast, without the float32 parameters and the input."""
    from xmoe_fairseq.moe.kernels.launch import record

    x_TD, padding = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.arange(TOKENS) % 10 == 0
    layer, dense = MoELayer(case.config("triton")), DenseFFN(WIDTH, DENSE)
    plans: list[Any] = []

    def forward(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", DTYPE):
            result = module(x_TD, padding) if isinstance(module, MoELayer) else module(x_TD)
        plans.append(result[1] if isinstance(result, tuple) else None)
        return output_of_result(result)

    with CountedCalls(Count()):
        of_dense = kept_bytes(lambda: forward(dense), list(dense.parameters()))
        with record(dry=True):
            of_layer = kept_bytes(lambda: forward(layer), list(layer.parameters()))
    # the plan keeps the lists of rows, not autograd
    lists = [value for value in vars(plans[-1].lists).values() if isinstance(value, Tensor)]
    of_layer += sum(value.nbytes for value in lists)
    return {"layer_MB": of_layer / 1e6, "dense_MB": of_dense / 1e6, "of_dense": of_layer / of_dense}


def output_of_result(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@reports_errors("gpu_count")
def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("bench gpu-count", __doc__)
    cases = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases, help="default: all")
    parser.flag("--out", old="--json", help="also write all counts, call by call, as JSON")
    options: argparse.Namespace = parser.parse_args(argv)
    if not kernels.find_spec("triton"):
        parser.error("triton is not installed here; requirements-dev.txt names the version that is tested")
    os.environ["TRITON_INTERPRET"] = "1"  # lets kernels.chosen take CPU tensors; no kernel is run
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    kept: dict[str, dict[str, float]] = {}
    for case in CASES:
        if case.name in options.cases:
            rows += count_training(case)
            kept[case.name] = count_kept(case)
    for tokens in DECODED:
        rows += count_decoding(tokens)
    columns = ["mode", "tokens", "case", "way", "launches", "waits", "MB", "tile_MB", "GFLOP", "paper_ms", "of_dense"]
    print(table(rows, columns))
    print("\nKept for backward under autocast, beyond parameters:\n")
    print(table([{"case": name, **values} for name, values in kept.items()], ["case", *next(iter(kept.values()))]))
    if options.out:
        print("written:", write_result("gpu-count", {"rows": rows, "kept": kept}, options.out))


if __name__ == "__main__":
    sys.exit(main())
