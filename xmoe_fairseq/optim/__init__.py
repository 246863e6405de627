"""Optimisers for many parameters; importing registers them."""

import fairseq  # noqa: F401  first, since this import registers the package, which imports this folder

from . import fused_adam

__all__ = ["fused_adam"]
