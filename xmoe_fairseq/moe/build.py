"""One function that builds the right layer for a configuration."""

from __future__ import annotations

from typing import cast

from . import merged, routers  # noqa: F401
from .config import MoEConfig
from .layer import MoELayer
from .merged import layer as _merged_layer  # noqa: F401  registers itself
from .registry import LAYERS


def build_layer(config: MoEConfig) -> MoELayer:
    """The layer that ``config`` describes, with fresh weights: ``MoELayer``, or ``MergedMoELayer`` if it merges."""
    return cast(MoELayer, LAYERS[config.layer_kind](config))
