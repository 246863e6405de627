"""Parameters and FLOPs of the named architectures, counted from the built models.

Models are built on torch's meta device, without memory for their weights, so that large ones take no longer than
small ones. FLOPs are those of forward matrix products, 2 per multiply-add; a training update costs three times as much.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from fairseq.data import Dictionary
from fairseq.models import build_model
from fairseq.modules import MultiheadAttention
from fairseq.utils import import_user_module
from tabulate import tabulate
from torch import nn

import xmoe_fairseq  # noqa: F401  registers the architectures
from xmoe_fairseq.command_line import at_least, command_parser, reports_errors
from xmoe_fairseq.models import architectures
from xmoe_fairseq.models.architectures import ARCHITECTURES, Size
from xmoe_fairseq.moe import MergedMoELayer, MoEConfig, MoELayer
from xmoe_fairseq.moe.merged.flops import merged_layer_flops
from xmoe_fairseq.moe.registry import router_class

SIZES: dict[str, Size] = {
    "wmt23": architectures.WMT23,
    "tiny": architectures.TINY,
    "gpt2": architectures.GPT2,
    "gpt2-556m": architectures.GPT2_556M,
    "tiny-lm": architectures.TINY_LM,
}
_HEADERS = (
    "--arch",
    "shared",
    "gates",
    "experts",
    "active, training",
    "active, inference",
    "FFN FLOPs, training",
    "FFN FLOPs, inference",
    "MFLOPs a token, training",
    "MFLOPs a token, inference",
)


def build(arch: str, vocabulary: int, length: int) -> nn.Module:
    """``--arch arch`` with shared embeddings, on the device that torch now builds on."""
    dictionary = Dictionary()
    for index in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(str(index))
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    settings = Namespace(arch=arch, tokens_per_sample=length, max_target_positions=None)
    if not ARCHITECTURES[arch].is_language_model:
        settings = Namespace(arch=arch, share_all_embeddings=True)
    return build_model(settings, task)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; ``gates`` are those of routers of every kind."""

    shared: int
    gates: int
    experts: int

    @classmethod
    def of(cls, model: nn.Module) -> Parameters:
        total = sum(p.numel() for p in model.parameters())
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
        in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
        return cls(total - in_layers, in_layers - experts, experts)

    def active(self, rows: float | None, num_experts: int) -> float | None:
        """Parameters that one token uses; None if ``rows`` is None."""
        return None if rows is None else self.shared + self.gates + self.experts * rows / max(num_experts, 1)


def rows_per_token(config: MoEConfig, training: bool) -> float | None:
    """Experts that compute an average token.

    With capacity this is the most that it allows (Eq 6), reached when the load is even; else it is what the router
    wants. None for a threshold without capacity, whose experts depend on the trained router (eval.sweep counts them).
    """
    gamma = config.capacity_factor if training else config.eval_capacity_factor
    wanted = router_class(config.router).experts_wanted(config)
    return min((value for value in (wanted, gamma) if value is not None), default=None)


def layer_flops(layer: MoELayer, length: int, training: bool) -> tuple[float, float] | None:
    """FLOPs of the experts (merging included) and of the gates, per token of a sentence of ``length`` tokens."""
    config = layer.config
    if isinstance(layer, MergedMoELayer):
        experts = merged_layer_flops(config, length, 1) / length
        gates = 2 * sum(gate.weight.numel() for gate in (layer.gate1, layer.gate2)) / length
        return experts - gates, gates * (2 if training else 1)  # the noise has weights of its own
    rows = rows_per_token(config, training)
    if rows is None:
        return None
    return rows * config.flops_per_row, 2 * sum(p.numel() for p in layer.router.parameters())


def token_flops(model: nn.Module, length: int, training: bool) -> float | None:
    """Forward FLOPs per token (per source token and target token) of sentences of ``length`` tokens."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    inside = {module for layer in layers for module in layer.modules()}
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in inside:
            total += 2 * module.weight.numel()
        elif isinstance(module, MultiheadAttention):
            total += 4 * length * module.embed_dim
    for layer in layers:
        flops = layer_flops(layer, length, training)
        if flops is None:
            return None
        total += sum(flops)
    return total


def table_row(arch: str, vocabulary: int, length: int) -> list[str]:
    """One line of the table."""
    size = ARCHITECTURES[arch]
    with torch.device("meta"):
        model = build(arch, vocabulary, length)
    counts = Parameters.of(model)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    active, ffn, whole = [], [], []
    for training in (True, False):
        experts, ratio, rows = 1, 1.0, 1.0
        if layers:
            config, flops = layers[0].config, layer_flops(layers[0], length, training)
            experts = config.num_experts
            ratio = None if flops is None else flops[0] / (4 * size.embed_dim * size.ffn_dim)
            rows = rows_per_token(config, training)
        active.append(counts.active(rows, experts))
        ffn.append(ratio)
        whole.append(token_flops(model, length, training))
    numbers = [counts.shared, counts.gates, counts.experts, *active]
    return [
        f"`{arch}`",
        *(_shown(number, 1e6, "M") for number in numbers),
        *(_shown(ratio, 1, "", 3) for ratio in ffn),
        *(_shown(flops, 1e6, "", 1) for flops in whole),
    ]


def _shown(value: float | None, unit: float, suffix: str, digits: int = 2) -> str:
    return "set by t" if value is None else f"{value / unit:.{digits}f}{suffix}"


def table(size: str, vocabulary: int, length: int) -> str:
    """Markdown table of all architectures of one size."""
    names = [name for name, its_size in ARCHITECTURES.items() if its_size == SIZES[size]]
    rows = [table_row(name, vocabulary, length) for name in names]
    return tabulate(rows, _HEADERS, tablefmt="github", disable_numparse=True)


@reports_errors("sizes")
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("sizes", __doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="wmt23", help="default: %(default)s")
    joined = "entries of the joined dictionary"
    parser.flag("--vocab-size", old="--vocabulary", type=at_least(5), default=32000, help=joined)
    length = "tokens of a sentence, for attention and MEO (default: %(default)s)"
    parser.add_argument("--length", type=at_least(1), default=32, help=length)
    parser.flag("--user-dir", help="package with architectures of your own (register_moe)")
    args = parser.parse_args(argv)
    import_user_module(args)
    print(table(args.size, args.vocab_size, args.length))
    return 0


if __name__ == "__main__":
    sys.exit(main())
