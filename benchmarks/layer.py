"""Measure time, memory and FLOPs of one MoE layer, beside a dense FFN of equal FLOPs and other ways to compute it.

    xmoe bench layer [--tokens 1024 4096] [--dtype float32] [--device cpu] [--repeats 7] [--peers]

Three settings of the paper at D 512, equal parameters and FLOPs: 32 x 2048 top-1 gamma 1, 64 x 1024 t 0.9 gamma 2,
128 x 512 t 0.9 gamma 4. The router is fresh, so that almost every expert is full: the load of early training. Modes:
train (forward and backward), infer (forward without gradients, capacity on), decode (few tokens, no capacity, a router
that wants about 4 experts a token).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.common import add_timing_flags, compare, kept_bytes, peak_bytes, settle_memory, table, write_result
from benchmarks.peers import DenseFFN, ExpertGemms, LoopOverExperts, PlainBatched, fairscale_moe
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.moe import MoEConfig, MoELayer

WIDTH, DENSE = 512, 2048
OTHER_WAYS = {
    "ours, a GEMM per expert": {"compute": "loop"},
    "ours, bfloat16 experts": {"weights": "bfloat16"},
    "ours, int8 experts": {"weights": "int8"},
}


@dataclass(frozen=True)
class Case:
    """Sizes and routing of one layer. ``gamma`` makes its FLOPs those of the dense FFN (Eq 6)."""

    num_experts: int
    expert_dim: int
    threshold: float
    gamma: float

    @property
    def name(self) -> str:
        return f"{self.num_experts}x{self.expert_dim}"

    def config(self, compute: str = "auto") -> MoEConfig:
        return MoEConfig(
            embed_dim=WIDTH,
            num_experts=self.num_experts,
            expert_dim=self.expert_dim,
            threshold=self.threshold,
            capacity_factor=self.gamma,
            eval_capacity_factor=self.gamma,
            compute=compute,
        )


CASES = [Case(32, 2048, 0.0, 1.0), Case(64, 1024, 0.9, 2.0), Case(128, 512, 0.9, 4.0)]


def output_of(module: nn.Module, x_TD: Tensor) -> Tensor:
    result = module(x_TD)
    return result[0] if isinstance(result, tuple) else result


def train_step(module: nn.Module, x_TD: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    """A call that runs forward and backward and then frees the gradients, as an optimiser would."""

    def run() -> None:
        leaf = x_TD.detach().requires_grad_()
        output_of(module, leaf).backward(grad_TD)
        module.zero_grad(set_to_none=True)

    module.train()
    return run


def inference(module: nn.Module, x_TD: Tensor) -> Callable[[], None]:
    def run() -> None:
        module.eval()
        with torch.no_grad():
            output_of(module, x_TD)

    return run


def build(case: Case, tokens: int, with_peers: bool, like: Tensor) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {"dense": DenseFFN(WIDTH, DENSE), "ours": MoELayer(case.config())}
    if with_peers:
        arguments = (WIDTH, case.num_experts, case.expert_dim, case.threshold, case.gamma)
        modules["loop over experts (official code's way)"] = LoopOverExperts(*arguments)
        modules["plain batched"] = PlainBatched(*arguments)
        rows = max(1, round(case.gamma * tokens / case.num_experts))
        modules["GEMMs alone"] = ExpertGemms(WIDTH, case.num_experts, case.expert_dim, rows)
        if case.gamma == 2.0 and like.dtype == torch.float32:
            modules["fairscale MOELayer, top-2"] = fairscale_moe(WIDTH, case.num_experts, case.expert_dim)
    return {name: module.to(like.device, like.dtype) for name, module in modules.items()}


def inputs_of(name: str, module: nn.Module, x_TD: Tensor) -> Tensor:
    if isinstance(module, ExpertGemms):
        experts, rows, width = module.shape
        return torch.randn(experts * rows, width, dtype=x_TD.dtype, device=x_TD.device)
    return x_TD


def measure(case: Case, tokens: int, mode: str, options: argparse.Namespace) -> list[dict]:
    x_TD = torch.randn(tokens, WIDTH, dtype=getattr(torch, options.dtype), device=options.device)
    runs, memory = {}, {}
    for name, module in build(case, tokens, options.peers, x_TD).items():
        rows = inputs_of(name, module, x_TD)
        runs[name] = train_step(module, rows, torch.randn_like(rows)) if mode == "train" else inference(module, rows)
        if mode == "train":
            leaf = rows.detach().requires_grad_()
            kept = kept_bytes(lambda m=module, x=leaf: output_of(m, x), list(module.parameters()))
            memory[name] = {"kept_MB": kept / 1e6, "peak_MB": peak_bytes(runs[name], options.device) / 1e6}
    summary = compare(runs, options.repeats, options.device)
    head = {"case": case.name, "tokens": tokens, "mode": mode, "dtype": options.dtype}
    return [{**head, "method": name, **row, **memory.get(name, {})} for name, row in summary.items()]


def measure_decoding(tokens: int, options: argparse.Namespace) -> list[dict]:
    """Time a few tokens through 64 x 1024, without capacity and with a router that wants about 4 experts a token.

    Beside the layer as it is stand one GEMM per expert instead of the kernels for few rows, and quantised experts.
    """
    config = MoEConfig(WIDTH, 64, 1024, threshold=0.9)
    case = Case(64, 1024, 0.9, 2.0)
    x_TD = torch.randn(tokens, WIDTH, dtype=getattr(torch, options.dtype), device=options.device)
    modules: dict[str, nn.Module] = {"dense": DenseFFN(WIDTH, DENSE), "ours": MoELayer(config)}
    modules["loop over experts (official code's way)"] = LoopOverExperts(WIDTH, 64, 1024, case.threshold, case.gamma)
    modules = {name: module.to(x_TD) for name, module in modules.items()}
    official = modules["loop over experts (official code's way)"]
    with torch.no_grad():
        for gate in (modules["ours"].router.weight, official.route.gate.weight):
            gate.mul_(scale_for(4.0, gate, x_TD))
        for name, settings in OTHER_WAYS.items():
            modules[name] = MoELayer(replace(config, **settings)).to(x_TD)
            modules[name].load_state_dict(modules["ours"].state_dict())
        plan = modules["ours"].eval()(x_TD)[1]
    runs = {name: inference(module, x_TD) for name, module in modules.items()}
    summary = compare(runs, options.repeats * 5, options.device)
    head = {"case": case.name, "tokens": tokens, "mode": "decode", "dtype": options.dtype}
    active = int((plan.count_E > 0).sum())
    read = {"active_experts": active, "experts_per_token": plan.count_E.sum().item() / tokens}
    return [{**head, "method": name, **row, **(read if name == "ours" else {})} for name, row in summary.items()]


def scale_for(wanted: float, weight_ED: Tensor, x_TD: Tensor) -> float:
    """The factor of the router's weights at which a token wants ``wanted`` experts for a mass of 0.9, by bisection."""
    low, high = 0.1, 1000.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        prob = (x_TD.float() @ weight_ED.float().t() * middle).softmax(-1).sort(-1, descending=True).values
        taken = (prob.cumsum(-1) < 0.9).sum(-1) + 1
        low, high = (middle, high) if taken.float().mean() > wanted else (low, middle)
    return middle


@reports_errors("layer")
def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser("bench layer", __doc__)
    parser.add_argument(
        "--tokens", type=at_least(1), nargs="+", default=[1024, 4096], metavar="N", help="tokens of one call"
    )
    modes = ["train", "infer", "decode"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes, help="default: all three")
    parser.add_argument("--peers", action="store_true", help="also time the other ways to compute the layer")
    add_timing_flags(parser, repeats=7)
    options = parser.parse_args(argv)
    settle_memory()
    rows: list[dict] = []
    for mode in options.modes:
        if mode == "decode":
            for tokens in (5, 20, 80):
                rows += measure_decoding(tokens, options)
            continue
        for tokens in options.tokens:
            for case in CASES:
                rows += measure(case, tokens, mode, options)
    columns = ["mode", "tokens", "case", "method", "ms", "ratio", "ratio_p10", "ratio_p90", "kept_MB", "peak_MB"]
    print(table(rows, columns))
    print("written:", write_result(f"layer-{options.dtype}-{options.device}", {"rows": rows}, options.out))


if __name__ == "__main__":
    sys.exit(main())
