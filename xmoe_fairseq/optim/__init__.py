"""Optimisers for many parameters; importing registers them."""

import fairseq  # noqa: F401  the door opens first, while no module of this folder is half imported

from . import fused_adam

__all__ = ["fused_adam"]
