"""Models small enough to be built for each test, which sets their weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

import xmoe_fairseq

assert xmoe_fairseq  # importing it registers the architectures


def dictionary(symbols: Iterable[str]) -> Dictionary:
    words = Dictionary()
    for symbol in symbols:
        words.add_symbol(symbol)
    return words


def settings(arch: str, *, embed_dim: int = 16, ffn_dim: int, positions: int, **more: Any) -> Namespace:
    """Settings of ``arch`` with two layers of two heads a side; ``more`` are any others, which come first."""
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"embed_dim": embed_dim, "attention_heads": 2, "ffn_embed_dim": ffn_dim, "layers": 2}.items()
    }
    limits = {"max_source_positions": positions, "max_target_positions": positions}
    args = Namespace(**{**sizes, **limits, "arch": arch, "_name": arch, **more})
    ARCH_CONFIG_REGISTRY[arch](args)
    return args


def build(args: Namespace, task: Any, seed: int) -> Any:
    """A freshly initialised model of `settings`."""
    torch.manual_seed(seed)
    return ARCH_MODEL_REGISTRY[args.arch].build_model(args, task)
