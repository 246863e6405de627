"""FLOPs of a layer of merged experts."""

from __future__ import annotations

from ..config import MoEConfig
from .gate import choices_merged


def merge_flops(config: MoEConfig) -> int:
    """FLOPs of merging both maps for one sentence: a product and a sum per number of each merged matrix."""
    chosen = choices_merged(config)
    added = chosen if 2 * chosen < config.num_experts else config.num_experts  # merge() computes over all from half on
    return (2 * added - 1) * 2 * config.embed_dim * config.expert_dim


def merged_layer_flops(config: MoEConfig, num_tokens: int, num_sentences: int) -> int:
    """Forward FLOPs of one layer at inference: 2 per multiply-add; biases, activation and softmax not counted."""
    gates = 2 * 2 * config.num_experts * config.embed_dim
    adapters = 0
    if config.token_adapter:
        adapters = sum(4 * width * max(1, width // 64) for width in (config.embed_dim, config.expert_dim))
    return num_tokens * (config.flops_per_row + adapters) + num_sentences * (merge_flops(config) + gates)
