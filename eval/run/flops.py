"""Forward FLOPs per token, counted from the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NO_PRODUCT = ("embed_tokens", "embed_positions", "layer_norm", "layernorm")


def flops_per_token(model: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs of matrix products for one token on each side of the model, 2 per multiply-add.

    Gates are counted. Attention scores, whose cost grows with the length, are not.

    Args:
        model: a checkpoint's tensors.
        settings: its model's settings, for the width of the dense FFN that a MoE layer stands for.
    Returns:
        ``shared``: FLOPs of everything but experts. ``moe_as_dense``: FLOPs of dense FFNs in place of the MoE layers,
        to be multiplied by a measured cost relative to dense (0 for a dense model, whose FFNs are in ``shared``).
    """
    shared = as_dense = 0.0
    for name, tensor in model.items():
        if name.endswith("moe.experts.w1"):
            side = "encoder" if name.startswith("encoder") else "decoder"
            as_dense += 4.0 * tensor.size(1) * settings[f"{side}_ffn_embed_dim"]
        elif tensor.dim() == 2 and ".experts." not in name and not any(part in name for part in _NO_PRODUCT):
            shared += 2.0 * tensor.numel()
    return {"shared": shared, "moe_as_dense": as_dense}
