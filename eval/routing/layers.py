"""The MoE layers of a model, by name."""

from __future__ import annotations

from torch import nn

from xmoe_fairseq.moe import MoELayer


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Module name -> MoE layer, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
