"""fairseq models with mixture-of-experts layers in place of feed-forward networks."""

from . import translation  # noqa: F401  importing registers it
