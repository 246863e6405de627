"""Compute what spreading experts over GPUs costs and saves: the table of docs/scaling.md for one model.

xmoe bench cost-model --ranks 8 16 32
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cost_formulas import (
    NODES,
    Model,
    break_even_tokens,
    exchange_bytes_per_token,
    gradient_bytes,
    memory,
    seconds_per_update,
)
from xmoe_fairseq.command_line import command_parser, reports_errors


def report(model: Model, ranks_list: list[int], tokens: int) -> str:
    """The table of docs/scaling.md for one model."""
    short = [node.name.split("-")[0].split(",")[0] for node in NODES]
    lines = [
        f"{model.num_experts} experts x {model.expert_dim} in {model.moe_layers} layers, {model.rows_per_token:g} rows "
        f"a token; {model.shared_parameters / 1e6:.1f} M shared, {model.expert_parameters / 1e6:.1f} M of experts; "
        f"{tokens} source and target tokens per GPU and update, bf16 activations",
        "",
        "| GPUs | experts | all-to-all B/token | all-reduce MB | weights + gradients GB | Adam | activations | all | "
        + " | ".join(f"ms, {name} | break-even tokens" for name in short)
        + " |",
        "|---:|---|" + "---:|" * (6 + 2 * len(NODES)),
    ]
    for ranks in ranks_list:
        for parallel in (False, True) if ranks > 1 else (False,):
            lines.append(_row(model, ranks, tokens, parallel))
    return "\n".join(lines)


def _row(model: Model, ranks: int, tokens: int, parallel: bool) -> str:
    held = model.shared_parameters + (0 if parallel else model.expert_parameters)
    use = memory(model, ranks, tokens, parallel=parallel)
    cells = [
        str(ranks),
        "spread" if parallel else "replicated",
        f"{exchange_bytes_per_token(model, ranks):.0f}" if parallel else "0",
        f"{gradient_bytes(held, ranks) / 1e6:.0f}",
        f"{(use.weights + use.gradients) / 1e9:.2f}",
        f"{use.optimizer / 1e9:.2f}",
        f"{use.activations / 1e9:.2f}",
        f"{use.total / 1e9:.1f}",
    ]
    for node in NODES:
        cells.append(f"{1e3 * seconds_per_update(model, node, ranks, tokens, parallel=parallel):.1f}")
        cells.append(f"{break_even_tokens(model, node, ranks):.0f}" if parallel else "")
    return "| " + " | ".join(cells) + " |"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("bench cost-model", __doc__.splitlines()[0])
    parser.flag("--num-experts", old="--experts", default=64, help="experts per layer")
    parser.add_argument("--expert-dim", type=int, default=1024, help="hidden units of one expert (default: 1024)")
    parser.add_argument(
        "--rows-per-token", type=float, default=2.0, help="experts that compute a token, at most gamma (default: 2)"
    )
    parser.add_argument("--embed-dim", type=int, default=512, help="model width (default: 512)")
    parser.flag("--vocab-size", old="--vocabulary", default=32000, help="joined vocabulary")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per GPU and update (default: 8192)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="numbers of GPUs")
    parsed = parser.parse_args(arguments)
    for ranks in parsed.ranks:
        if ranks < 1 or parsed.num_experts % ranks:
            parser.error(f"--ranks {ranks} does not divide --num-experts {parsed.num_experts}; choose numbers that do")
    return parsed


@reports_errors("cost_model")
def main(argv: Sequence[str] | None = None) -> None:
    given = parse_arguments(argv)
    model = replace(
        Model(),
        num_experts=given.num_experts,
        expert_dim=given.expert_dim,
        rows_per_token=given.rows_per_token,
        embed_dim=given.embed_dim,
        vocabulary=given.vocab_size,
    )
    print(report(model, given.ranks, given.tokens))


if __name__ == "__main__":
    sys.exit(main())
