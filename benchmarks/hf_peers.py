"""Time of Hugging Face transformers' sparse blocks beside our MoE layer and a dense FFN of equal FLOPs, in turns.

    bash benchmarks/hf_peers.sh [--tokens 1024 4096] [--modes train infer] [--dtype float32] [--device cpu]

The script makes an environment with transformers in it; there ``python -m benchmarks.hf_peers`` is this file.

Two settings at D 512, each of one dense FFN's FLOPs (2048 hidden units): 32 x 2048 top-1 and 64 x 1024 top-2. Nothing
is dropped anywhere, so that all methods compute the same number of rows, and all share one router weight, so that
every expert gets the same tokens. The methods:

  ours            MoELayer: GELU experts with biases; weights raw in top-1, divided by their sum in top-2.
  Switch          SwitchTransformersSparseMLP: a loop over the experts that have tokens; GELU experts without biases.
                  Top-1 only; capacity set to the number of tokens. Checked before timing: it returns what ours does
                  with the same weights.
  Mixtral, loop   MixtralSparseMoeBlock with experts "eager": a loop over the experts that have tokens. Experts are
                  gated (SwiGLU): three matrices instead of two, so two thirds of the hidden units (1368 for 2048, 680
                  for 1024: multiples of 8, within half a percent of equal FLOPs). No capacity; weights divided by
                  their sum.
                  Training is slow by the way its weights are indexed: autograd makes a gradient of the size of all
                  experts for each expert that has tokens, and adds them up.
  Mixtral, grouped
                  the same block and weights with experts "grouped_mm": rows sorted by expert, torch's grouped GEMM.
                  Checked before timing: it returns what the loop returns.

Left out: transformers' experts "batched_mm", which copies an expert's matrices once per token (17 GB for 4096 tokens),
and NLLB-MoE, whose block in the pinned release treats the one-hot mask of first choices as expert numbers and so runs
one expert on nearly every (token, expert) pair.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import add_timing_flags, compare, kept_bytes, peak_bytes, settle_memory, table, write_result
from benchmarks.layer import DENSE, WIDTH, inference, output_of, train_step
from benchmarks.peers import DenseFFN
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.moe import MoEConfig, MoELayer
from xmoe_fairseq.moe.flops import counted_flops


class Setting(NamedTuple):
    """``top_k`` experts of ``expert_dim`` units, which together have the hidden units of the dense FFN."""

    num_experts: int
    expert_dim: int
    top_k: int

    @property
    def name(self) -> str:
        return f"{self.num_experts}x{self.expert_dim} top-{self.top_k}"


SETTINGS = (Setting(32, 2048, 1), Setting(64, 1024, 2))


class OneSequence(nn.Module):
    """Gives tokens (T, D) to a block of transformers, which wants (batch, length, D)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.block(x_TD.unsqueeze(0)).squeeze(0)


def gated_hidden(expert_dim: int) -> int:
    """Hidden units of a gated expert (three matrices) of the FLOPs of a plain one (two); a multiple of 8.

    torch's grouped GEMM wants rows of a multiple of 16 bytes, in every dtype.
    """
    return 8 * max(1, round(expert_dim * 2 / 3 / 8))


def our_layer(setting: Setting, width: int = WIDTH) -> MoELayer:
    several = setting.top_k > 1
    return MoELayer(
        MoEConfig(
            width,
            setting.num_experts,
            setting.expert_dim,
            router="top_k",
            top_k=setting.top_k,
            normalize_weights=several,
            capacity_factor=None,
        )
    )


def switch_block(ours: MoELayer, capacity: int) -> OneSequence:
    """Switch Transformers' block with the weights of ``ours``, biases left out; ``capacity`` in rows an expert."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = SwitchTransformersConfig(
        d_model=ours.config.embed_dim,
        d_ff=ours.config.expert_dim,
        num_experts=ours.config.num_experts,
        expert_capacity=capacity,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        dense_act_fn="gelu",
    )
    block = SwitchTransformersSparseMLP(config)
    with torch.no_grad():
        block.router.classifier.weight.copy_(ours.router.weight)
        for number in range(config.num_experts):
            expert = block.experts[f"expert_{number}"]
            expert.wi.weight.copy_(ours.experts.w1[number].t())
            expert.wo.weight.copy_(ours.experts.w2[number].t())
    return OneSequence(block)


def mixtral_block(ours: MoELayer, implementation: str) -> OneSequence:
    """Mixtral's block with the router of ``ours`` and fresh experts; ``implementation`` is eager or grouped_mm."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=ours.config.embed_dim,
        intermediate_size=gated_hidden(ours.config.expert_dim),
        num_local_experts=ours.config.num_experts,
        num_experts_per_tok=ours.config.top_k,
        router_jitter_noise=0.0,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        for weight in block.experts.parameters():  # left uninitialised by the block's own constructor
            weight.normal_(std=weight.size(-1) ** -0.5)
    return OneSequence(block)


def without_biases(layer: MoELayer) -> MoELayer:
    with torch.no_grad():
        layer.experts.b1.zero_()
        layer.experts.b2.zero_()
    return layer


def require_same(what: str, got: Tensor, want: Tensor) -> None:
    """Raise ValueError unless both are equal up to the order of sums: two different functions cannot be compared."""
    apart = float((got - want).abs().max() / want.abs().max())
    if not apart <= 1e-4:
        raise ValueError(f"{what}: outputs differ by {apart:.2g} of the largest value, at most 1e-4 is rounding")


def build(setting: Setting, tokens: int, like: Tensor) -> dict[str, nn.Module]:
    """The candidates, checked against each other in float32 and then moved to the dtype of ``like``."""
    ours = without_biases(our_layer(setting))  # they are still computed
    loop, grouped = (mixtral_block(ours, implementation) for implementation in ("eager", "grouped_mm"))
    grouped.load_state_dict(loop.state_dict())
    modules: dict[str, nn.Module] = {"dense": DenseFFN(WIDTH, DENSE), "ours": ours}
    if setting.top_k == 1:
        modules["transformers Switch"] = switch_block(ours, capacity=tokens)
    modules |= {"transformers Mixtral, loop": loop, "transformers Mixtral, grouped": grouped}
    x_TD = torch.randn(min(tokens, 128), WIDTH, device=like.device)
    for module in modules.values():
        module.to(like.device).eval()
    with torch.no_grad():
        outputs = {name: output_of(module, x_TD) for name, module in modules.items()}
    require_same("Mixtral's two ways", outputs["transformers Mixtral, grouped"], outputs["transformers Mixtral, loop"])
    if setting.top_k == 1:
        require_same("Switch and ours", outputs["transformers Switch"], outputs["ours"])
    return {name: module.to(like.dtype) for name, module in modules.items()}


def measure(setting: Setting, tokens: int, options: argparse.Namespace) -> list[dict]:
    x_TD = torch.randn(tokens, WIDTH, dtype=getattr(torch, options.dtype), device=options.device)
    modules = build(setting, tokens, x_TD)
    flops = {name: counted_flops(inference(module, x_TD)) for name, module in modules.items()}
    rows = []
    for mode in options.modes:
        runs, memory = {}, {}
        for name, module in modules.items():
            if mode == "infer":
                runs[name] = inference(module, x_TD)
                continue
            runs[name] = train_step(module, x_TD, torch.randn_like(x_TD))
            leaf = x_TD.detach().requires_grad_()
            kept = kept_bytes(lambda m=module, x=leaf: output_of(m, x), list(module.parameters()))
            memory[name] = {"kept_MB": kept / 1e6, "peak_MB": peak_bytes(runs[name], options.device) / 1e6}
        summary = compare(runs, options.repeats, options.device)
        head = {"case": setting.name, "tokens": tokens, "mode": mode, "dtype": options.dtype}
        for name, row in summary.items():
            counted = {"flops": flops[name] / flops["dense"]}
            rows.append({**head, "method": name, **counted, **row, **memory.get(name, {})})
    return rows


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("bench hf-peers", __doc__)
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[1024, 4096], help="tokens of one call")
    parser.add_argument("--modes", nargs="+", default=["train", "infer"], choices=["train", "infer"])
    add_timing_flags(parser, repeats=7)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is not installed here; bash benchmarks/hf_peers.sh makes an environment with it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    return options


@reports_errors("hf_peers")
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    settle_memory()
    from transformers import __version__ as version

    rows = [row for tokens in options.tokens for setting in SETTINGS for row in measure(setting, tokens, options)]
    rows.sort(key=lambda row: options.modes.index(row["mode"]))
    shown = ["mode", "tokens", "case", "method", "flops", "ms", "ratio", "ratio_p10", "ratio_p90", "kept_MB", "peak_MB"]
    print(table(rows, shown))
    result = {"rows": rows, "transformers": version}
    print("written:", write_result(f"hf-peers-{options.dtype}-{options.device}", result, options.out))


if __name__ == "__main__":
    sys.exit(main())
