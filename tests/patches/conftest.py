"""The tiny models of the checkpoint tests serve here, too."""

from tests.checkpoints.conftest import tiny

__all__ = ["tiny"]
