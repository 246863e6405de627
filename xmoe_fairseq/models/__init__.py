"""fairseq models with mixture-of-experts layers in place of feed-forward networks."""

from . import architectures, language_model, translation  # noqa: F401  importing registers them
