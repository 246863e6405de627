"""fairseq models with mixture-of-experts layers in place of feed-forward networks."""

import fairseq  # noqa: F401  first, since this import registers the package, which imports this folder

from . import architectures, int8, language_model, translation  # noqa: F401  importing registers them
