"""Optimisers for many parameters; importing registers them."""

from . import fused_adam

__all__ = ["fused_adam"]
