"""Time one MoE layer on a GPU, eager and replayed from a CUDA graph, beside a dense FFN and other implementations.

    xmoe bench gpu-layer [--modes train infer decode] [--tokens 8192 16384] [--dtype bfloat16]

The settings are those of ``benchmarks.layer``: 32x2048, 64x1024, 128x512 of one dense FFN's FLOPs. Training is forward
and backward with the balance loss. Times are medians of Triton's ``do_bench``, which clears the second-level cache
between runs. A graph shows what the device needs when the host's launches do not hold it up. Methods that wait for the
host cannot be captured; the table says "waits" for them. ``profile`` in the JSON lists each kernel's time and launches.

The methods are the dense FFN, ours by kernels (``moe_compute triton``), ours by torch (grouped, bmm, loop), torch's
grouped GEMMs alone on rows in place, and, where they are installed, ScatterMoE and transformers' blocks. torch, Triton
and SciPy suffice.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import add_out_flag, kept_bytes, peak_bytes, table, write_result
from benchmarks.layer import CASES, DENSE, WIDTH, Case, output_of, scale_for
from benchmarks.peers import DenseFFN, GroupedGemms, scatter_moe
from xmoe_fairseq.command_line import command_parser, reports_errors
from xmoe_fairseq.moe import MoEConfig, MoELayer

PROFILED = ("dense", "ours by kernels")
COLUMNS = [
    "mode", "tokens", "case", "method", "eager_ms", "eager_ratio", "graph_ms", "graph_ratio", "host_ms", "kept_MB",
    "peak_MB",
]  # fmt: skip


def our_layers(config: MoEConfig, ways: tuple[str, ...], like: Tensor) -> dict[str, nn.Module]:
    """Our layer computed in several ways, with one set of weights."""
    names = {"triton": "ours by kernels"}
    torch.manual_seed(0)
    first = MoELayer(replace(config, compute=ways[0])).to(like.device, like.dtype)
    layers: dict[str, nn.Module] = {}
    for way in ways:
        layer = MoELayer(replace(config, compute=way)).to(like.device, like.dtype)
        layer.load_state_dict(first.state_dict())
        layers[names.get(way, f"ours by torch, {way}")] = layer
    return layers


def candidates(case: Case, tokens: int, like: Tensor) -> Iterator[tuple[str, nn.Module | str]]:
    """Each method of the comparison, or the reason why it is left out. Only one of them is in memory at a time."""
    yield "dense", DenseFFN(WIDTH, DENSE).to(like)
    for way in ("triton", "grouped", "bmm"):
        yield from built(way, lambda way=way: our_layers(case.config(), (way,), like))
    shape, top_k = (WIDTH, case.num_experts, case.expert_dim), round(case.gamma)
    rows = max(1, round(case.gamma * tokens / case.num_experts))
    peers: dict[str, Callable[[], nn.Module]] = {
        "torch's grouped GEMMs alone": lambda: GroupedGemms(*shape, rows),
        f"ScatterMoE, top-{top_k}": lambda: scatter_moe(*shape, top_k),
    }
    for name, make in peers.items():
        yield from built(name, lambda name=name, make=make: {name: make().to(like)})
    yield from built("transformers", lambda: transformers_blocks(case, tokens, like))


def transformers_blocks(case: Case, tokens: int, like: Tensor) -> dict[str, nn.Module]:
    """Blocks of Hugging Face transformers at this setting; none for settings they do not serve."""
    from benchmarks import hf_peers

    settings = [s for s in hf_peers.SETTINGS if (s.num_experts, s.expert_dim) == (case.num_experts, case.expert_dim)]
    modules = hf_peers.build(settings[0], tokens, like) if settings else {}
    return {f"{name}, no drops": module for name, module in modules.items() if name.startswith("transformers")}


def built(name: str, make: Callable[[], dict[str, nn.Module]]) -> Iterator[tuple[str, nn.Module | str]]:
    """What ``make`` builds. A peer that is not installed or of another version becomes a note in the table."""
    try:
        modules: dict[str, Any] = dict(make())
    except Exception as error:
        modules = {name: f"left out, {first_line(error)}"}
    while modules:
        yield modules.popitem()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def inputs_of(module: nn.Module, like: Tensor) -> Tensor:
    return torch.randn(module.num_rows, WIDTH).to(like) if isinstance(module, GroupedGemms) else like


def train_step(module: nn.Module, x_TD: Tensor) -> Callable[[], object]:
    """A call that runs forward and backward, with gradients of the input and of all parameters."""
    leaf, grad = x_TD.detach().requires_grad_(), torch.randn_like(x_TD)
    leaves, one = [leaf, *module.parameters()], torch.ones((), device=x_TD.device)

    def run() -> object:
        result = module(leaf)
        if isinstance(module, MoELayer):
            outputs, grads = [result[0], result[1].balance_loss], [grad, one]
        else:
            outputs, grads = [result], [grad]
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    module.train()
    return run


def inference(module: nn.Module, x_TD: Tensor) -> Callable[[], object]:
    module.eval()
    return torch.no_grad()(lambda: output_of(module, x_TD))


def median_ms(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=30, rep=150, return_mode="median"))


def waits(run: Callable[[], object]) -> bool:
    """True if the host waits for the device somewhere in ``run``."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """Replay of a CUDA graph that holds the launches of ``run``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def host_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds that the host needs to launch one run of a method that does not wait for the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * elapsed / repeats


def profile_of(run: Callable[[], object], repeats: int = 10) -> list[dict[str, Any]]:
    """Microseconds and launches of each kernel in one run, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    rows = [
        {"kernel": event.key[:120], "us": event.self_device_time_total / repeats, "launches": event.count / repeats}
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def measure_run(name: str, run: Callable[[], object]) -> dict[str, Any]:
    """Times of one method. A failure goes to ``note``, so that the other methods are still measured."""
    row: dict[str, Any] = {}
    try:
        for _ in range(3):
            run()
        row["eager_ms"] = median_ms(run)
        if waits(run):
            row["graph_ms"] = "waits"
        else:
            row["host_ms"] = host_ms(run)
            row["graph_ms"] = median_ms(graphed(run))
        if name in PROFILED:
            row["profile"] = profile_of(run)
    except Exception as error:
        row["note"] = first_line(error)
    return row


def measure(case: Case, tokens: int, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    like = torch.randn(tokens, WIDTH, dtype=getattr(torch, options.dtype), device="cuda")
    rows = []
    for name, module in candidates(case, tokens, like):
        head = {"case": case.name, "tokens": tokens, "mode": mode, "dtype": options.dtype, "method": name}
        if isinstance(module, str):
            rows.append({**head, "note": module})
            continue
        x_TD = inputs_of(module, like)
        run = train_step(module, x_TD) if mode == "train" else inference(module, x_TD)
        row = {**head, **measure_run(name, run)}
        if mode == "train" and "note" not in row:
            leaf = x_TD.detach().requires_grad_()
            row["kept_MB"] = kept_bytes(lambda m=module, x=leaf: output_of(m, x), list(module.parameters())) / 1e6
            row["peak_MB"] = peak_bytes(run, "cuda") / 1e6
        rows.append(row)
        del module, run
        torch.cuda.empty_cache()
    return with_ratios(rows)


def measure_decoding(tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a few tokens through 64 x 1024, without capacity and with a router that wants about 4 experts a token."""
    x_TD = torch.randn(tokens, WIDTH, dtype=getattr(torch, options.dtype), device="cuda")
    modules: dict[str, nn.Module] = {"dense": DenseFFN(WIDTH, DENSE).to(x_TD)}
    ours = our_layers(MoEConfig(WIDTH, 64, 1024, threshold=0.9), ("triton", "grouped", "bmm", "loop"), x_TD)
    gates = [layer.router.weight for layer in ours.values()]
    scale = scale_for(4.0, gates[0], x_TD)
    with torch.no_grad():
        for gate in gates:
            gate.mul_(scale)
    rows = []
    for name, module in {**modules, **ours}.items():
        head = {"case": "64x1024", "tokens": tokens, "mode": "decode", "dtype": options.dtype, "method": name}
        rows.append({**head, **measure_run(name, inference(module, x_TD))})
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its times divided by the dense FFN's, eager by eager and graph by graph; print the notes."""
    dense = rows[0]
    for row in rows:
        for way in ("eager", "graph"):
            mine, base = row.get(f"{way}_ms"), dense.get(f"{way}_ms")
            if isinstance(mine, float) and isinstance(base, float):
                row[f"{way}_ratio"] = mine / base
        if "note" in row:
            print(f"{row['mode']} {row['tokens']} {row['case']}, {row['method']}: {row['note']}", file=sys.stderr)
    return rows


@reports_errors("gpu_layer")
def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("bench gpu-layer", __doc__)
    modes = ["train", "infer", "decode"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes, help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 8192 16384; decode: 5 20 80 320 640")
    cases = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases, help="default: all")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="default bfloat16"
    )
    parser.add_argument("--tf32", action="store_true", help="let float32 products of all methods use TF32")
    add_out_flag(parser)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; xmoe bench layer runs on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    rows: list[dict[str, Any]] = []
    shown: list[str] = []
    for mode in options.modes:
        for tokens in options.tokens or ((5, 20, 80, 320, 640) if mode == "decode" else (8192, 16384)):
            cases = [None] if mode == "decode" else [case for case in CASES if case.name in options.cases]
            for case in cases:
                found = measure_decoding(tokens, options) if case is None else measure(case, tokens, mode, options)
                lines = table(found, COLUMNS).splitlines()
                print("\n".join(lines if not shown else lines[2:]), flush=True)
                shown, rows = lines, rows + found
    name = f"gpu-{'-'.join(options.modes)}-{options.dtype}"
    print("written:", write_result(name, {"rows": rows, "device": torch.cuda.get_device_name()}, options.out))
    if any("note" in row for row in rows if row["method"] in PROFILED):
        raise ValueError("the layer itself could not be measured everywhere; the reasons are above")


if __name__ == "__main__":
    sys.exit(main())
